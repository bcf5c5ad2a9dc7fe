"""Blocks that are pruned as a unit (an MLP, an expert, attention, the head) and their weight matrices.

A block stores modules and names, never tensors: streaming installs new parameters each time it loads a layer.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neuronrank_core.errors import InputError
from neuronrank_core.statistics.table import SHARED_INPUT
from neuronrank_torch.model.early_stop import captured

#: Roles of the matrices of an MLP and of attention: their names in statistics and reports, for every model family.
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _whole(tensor: Tensor) -> Tensor:
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
        Maps the module's output, shape (..., features), to the output of this matrix.
    """

    module: nn.Module
    attribute: str = "weight"
    part: Callable[[Tensor], Tensor] = _whole
    output_part: Callable[[Tensor], Tensor] = _whole

    @property
    def weight(self) -> Tensor:
        """The current matrix, shape (out_features, in_features); writing to it changes the model."""
        return self.part(getattr(self.module, self.attribute).detach())

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
    def weights(self) -> dict[str, Tensor]:
        """The current matrices by role."""
        return {role: projection.weight for role, projection in self.projections.items()}

    def copied(self) -> Any:
        """The same block on a deep copy of its module."""
        memo: dict[int, Any] = {}
        module = copy.deepcopy(self.module, memo)
        projections = {role: replace(p, module=memo[id(p.module)]) for role, p in self.projections.items()}
        return replace(self, module=module, projections=projections)


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
    def gated(self) -> bool:
        """Whether it has a gate."""
        return "gate_proj" in self.projections

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """Activation function of the gate; raises InputError if the module has no attribute of that name."""
        activation: Callable[[Tensor], Tensor] | None = getattr(self.module, self.activation_name, None)
        if activation is None:
            name = f"under the name `{self.activation_name}`" if self.activation_name else "of the gate alone"
            raise InputError(
                f"layer {self.where}: {type(self.module).__name__} has no activation function {name}",
                hint="use --nr-signal gate or product",
            )
        return activation

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return int(self.projections["down_proj"].weight.shape[1])

    def product(self, *args: Any, **kwargs: Any) -> Tensor:
        """Input of ``down_proj`` for an input of the MLP, shape (..., neurons), computed by the MLP's own forward."""
        return captured(self.projections["down_proj"].on_input, partial(self.module, *args, **kwargs))

    def remove_neurons(self, kept: Tensor, down_weight: Tensor) -> None:
        """Remove all other neurons: rows of gate and up, columns of down. Not for matrices that are stored transposed.

        Parameters
        ----------
        kept : int64 Tensor, shape (kept,)
            Indices of the neurons to keep, ascending.
        down_weight : Tensor, shape (out_features, kept)
            New weight of ``down_proj``.
        """
        neurons = self.neurons
        producers: Any = {id(p.module): p.module for role, p in self.projections.items() if role != "down_proj"}
        for module in producers.values():
            # A fused matrix (gate above up) loses the rows of both.
            rows = torch.cat([kept + start for start in range(0, len(module.weight), neurons)])
            for name, parameter in list(module.named_parameters(recurse=False)):
                shorter = nn.Parameter(parameter[rows].clone(), requires_grad=parameter.requires_grad)
                setattr(module, name, shorter)
            module.out_features = len(rows)
        down: Any = self.projections["down_proj"].module
        new = down_weight.to(down.weight.dtype).clone()
        down.weight = nn.Parameter(new, requires_grad=down.weight.requires_grad)
        down.in_features = len(kept)
        if hasattr(self.module, "intermediate_size"):
            self.module.intermediate_size = len(kept)  # type: ignore[assignment]
