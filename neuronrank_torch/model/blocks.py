"""Blocks that are pruned as a unit (an MLP, an expert, attention, the head) and their weight matrices.

A block stores modules and names, never tensors: streaming installs new parameters each time it loads a layer.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from neuronrank_core.errors import UnsupportedModelError
from neuronrank_core.statistics.table import SHARED_INPUT

#: Roles of the matrices of an MLP and of attention: their names in statistics and reports, for every model family.
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, where a matrix is no part of another."""
    return tensor


@dataclass(frozen=True, eq=False)
class Projection:
    """The matrix in a given role: a module's weight, or a part of one.

    Parameters
    ----------
    module : nn.Module
        The module that has the parameter.
    attribute : str
        Name of the parameter.
    part : callable
        Maps the parameter to the matrix, a view of shape (out_features, in_features): writing to the matrix changes
        the parameter.
    output_part : callable
        Maps the module's output, shape (..., features), to the output of this matrix; and its bias to that of the
        matrix.
    bias_attribute : str
        Name of the bias, if there is one.
    """

    module: nn.Module
    attribute: str = "weight"
    part: Callable[[Tensor], Tensor] = whole
    output_part: Callable[[Tensor], Tensor] = whole
    bias_attribute: str = "bias"

    @property
    def weight(self) -> Tensor:
        """The current matrix, shape (out_features, in_features); writing to it changes the model."""
        return self.part(getattr(self.module, self.attribute).detach())

    @property
    def bias(self) -> Tensor | None:
        """The current bias, shape (out_features,), if the module has one; writing to it changes the model."""
        bias = getattr(self.module, self.bias_attribute, None)
        return self.output_part(bias.detach()) if isinstance(bias, Tensor) else None

    def with_bias(self, weight: Tensor) -> Tensor:
        """A matrix for this role with the current bias, if there is one, as a last column."""
        return weight if self.bias is None else torch.cat([weight, self.bias[:, None].to(weight.dtype)], dim=1)

    def store(self, fitted: Tensor, at: Tensor | None = None) -> None:
        """Write a matrix, and the bias if there is one, as :meth:`with_bias` returns them, to the model.

        With ``at``, the columns of the matrix are written to these columns; the others keep their values.
        """
        columns = self.weight.shape[1] if at is None else len(at)
        self.weight[:, slice(None) if at is None else at] = fitted[:, :columns].to(self.weight.dtype)
        if self.bias is not None:
            self.bias.copy_(fitted[:, columns])

    def rounded(self, fitted: Tensor) -> Tensor:
        """A matrix as :meth:`store` rounds it."""
        return fitted.to(self.weight.dtype).to(fitted.dtype)

    def on_input(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Register a hook that calls ``see`` with the module's input at each forward pass."""
        return self.module.register_forward_pre_hook(lambda module, args: see(args[0]))

    def on_output(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Register a hook that calls ``see`` with this matrix's output at each forward pass."""
        return self.module.register_forward_hook(lambda module, args, output: see(self.output_part(output)))


def by_input(projections: Mapping[str, Projection]) -> dict[str, Projection]:
    """A matrix for each input, by the name under which statistics hold that input."""
    found: dict[str, Projection] = {}
    for role, projection in projections.items():
        found.setdefault(SHARED_INPUT.get(role, role), projection)
    return found


@dataclass(frozen=True, eq=False)
class Block:
    """Matrices that are scored by one table of statistics.

    Parameters
    ----------
    where : int or str
        Index of the layer, or another name of the block in error messages.
    module : nn.Module
        The module that runs the block's forward.
    projections : dict of Projection
        The matrices by role.
    prefix : str
        Prefix of the roles in a report, such as ``experts.3.``.
    """

    where: int | str
    module: nn.Module
    projections: Mapping[str, Projection]
    prefix: str = ""

    @property
    def heads(self) -> int | None:
        """Number of attention heads; None if there are none or they cannot be told apart."""
        return None

    @property
    def experts(self) -> int | None:
        """Number of experts, if they are scored as a whole."""
        return None

    @property
    def gated(self) -> bool:
        """Whether it has a gate."""
        return "gate_proj" in self.projections

    def signal(self, chosen: str) -> str:
        """The signal that is measured if this one is chosen: always the product if there is no gate.

        The magnitude of a plain MLP's pre-activation is no strength under ReLU.
        """
        return chosen if self.gated else "product"

    @property
    def weights(self) -> dict[str, Tensor]:
        """The current matrices by role."""
        return {role: projection.weight for role, projection in self.projections.items()}

    def copied(self, memo: dict[int, Any]) -> Any:
        """The same block with copies of its matrices' modules; blocks with the same ``memo`` share them."""
        copies = {role: replace(p, module=copy.deepcopy(p.module, memo)) for role, p in self.projections.items()}
        return replace(self, projections=copies)


@dataclass(frozen=True, eq=False)
class Mlp(Block):
    """An MLP, or one expert: its neurons are rows of ``gate_proj`` and ``up_proj`` and columns of ``down_proj``.

    A plain MLP has no ``gate_proj``: its ``up_proj`` produces the neurons alone.

    Parameters
    ----------
    activation_name : str
        Name of the module's attribute for the activation function; empty if the gate has none of its own.
    expert : int, optional
        Index among the routed experts of its layer.
    """

    activation_name: str = "act_fn"
    expert: int | None = None

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """Activation function of the gate; raises UnsupportedModelError if the module has no attribute of that name."""
        activation: Callable[[Tensor], Tensor] | None = getattr(self.module, self.activation_name, None)
        if activation is None:
            name = f"under the name `{self.activation_name}`" if self.activation_name else "of the gate alone"
            raise UnsupportedModelError(
                f"layer {self.where}: {type(self.module).__name__} has no activation function {name}",
                hint="use --nr-signal gate or product",
            )
        return activation

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return int(self.projections["down_proj"].weight.shape[1])

    @property
    def producers(self) -> list[Any]:
        """The modules that compute the neurons: one if gate and up are fused."""
        return list(dict.fromkeys(p.module for role, p in self.projections.items() if role != "down_proj"))

    def remove_neurons(self, kept: Tensor) -> None:
        """Remove all other neurons: rows of gate and up, columns of down.

        Parameters
        ----------
        kept : int64 Tensor, shape (kept,)
            Indices of the neurons to keep, ascending.
        """
        neurons, down = self.neurons, self.projections["down_proj"].module
        for module in self.producers:
            outputs, size = (-1, "nf") if isinstance(module, Conv1D) else (0, "out_features")
            # A fused matrix (gate above up) loses the rows of both.
            rows = torch.cat([kept + start for start in range(0, module.weight.shape[outputs], neurons)])
            for name, _ in list(module.named_parameters(recurse=False)):
                select_entries(module, name, outputs, rows)
            setattr(module, size, len(rows))
        inputs, size = (0, "nx") if isinstance(down, Conv1D) else (1, "in_features")
        select_entries(down, "weight", inputs, kept)
        setattr(down, size, len(kept))
        if hasattr(self.module, "intermediate_size"):
            self.module.intermediate_size = len(kept)  # type: ignore[assignment]


def routed(block: Block) -> bool:
    """Whether a block is one of the routed experts of a layer."""
    return isinstance(block, Mlp) and block.expert is not None


def select_entries(module: Any, name: str, axis: int, kept: Tensor) -> None:
    """Replace a parameter or a buffer by its entries at these indices of an axis."""
    tensor = getattr(module, name)
    shorter = tensor.detach().index_select(axis, kept.to(tensor.device))
    parameter = isinstance(tensor, nn.Parameter)
    setattr(module, name, nn.Parameter(shorter, requires_grad=tensor.requires_grad) if parameter else shorter)
