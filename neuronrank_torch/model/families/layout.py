"""Description of an MLP layout, and detection of MLPs that match it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from neuronrank_torch.model.blocks import MLP_PROJECTIONS, Mlp, Projection


@dataclass(frozen=True)
class Part:
    """A linear layer, or one of several equal parts of its rows.

    Parameters
    ----------
    name : str
        Attribute of the MLP for the linear layer, or a path of attributes with dots.
    number, of : int
        Index of the part, and number of parts.
    """

    name: str
    number: int = 0
    of: int = 1

    def projection(self, linear: nn.Linear | Conv1D) -> Projection:
        """The part of a linear layer as a projection."""
        if isinstance(linear, Conv1D):
            return Projection(linear, part=_transposed)
        if self.of == 1:
            return Projection(linear)
        take = partial(_chunk, number=self.number, of=self.of)
        return Projection(linear, part=partial(take, dim=0), output_part=partial(take, dim=-1))


def _transposed(tensor: Tensor) -> Tensor:
    """The matrix of a Conv1D, which holds it as (in_features, out_features)."""
    return tensor.T


def _chunk(tensor: Tensor, number: int, of: int, dim: int) -> Tensor:
    return tensor.chunk(of, dim=dim)[number]


def at_path(module: Any, path: str) -> Any:
    """What is at a path of attributes with dots; None if there is nothing."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


@dataclass(frozen=True)
class MlpLayout:
    """The linear layer of an MLP, or part of one, in each role.

    Parameters
    ----------
    gate_proj : Part, optional
        None in a plain MLP, whose ``up_proj`` produces the neurons alone.
    up_proj, down_proj : Part
    activation : str
        Attribute of the MLP for the activation function.
    """

    gate_proj: Part | None
    up_proj: Part
    down_proj: Part
    activation: str = "act_fn"

    def find(self, module: nn.Module, where: int | str) -> Mlp | None:
        """The module as an MLP; None if it does not have this layout."""
        if self.gate_proj is None and hasattr(module, "gate_proj"):
            return None
        parts: dict[str, Part] = {role: part for role in MLP_PROJECTIONS if (part := getattr(self, role)) is not None}
        linears = {role: at_path(module, part.name) for role, part in parts.items()}
        projections = {
            role: parts[role].projection(linear)
            for role, linear in linears.items()
            if isinstance(linear, (nn.Linear, Conv1D))
        }
        if len(projections) < len(parts):
            return None
        if projections["up_proj"].weight.shape[0] != projections["down_proj"].weight.shape[1]:
            return None  # Under one name, a linear layer is up alone in some families, and gate and up in others.
        return Mlp(where, module, projections, activation_name=self.activation)
