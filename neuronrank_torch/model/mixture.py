"""The routed experts of a layer as one block, from which whole experts are removed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from neuronrank_core.errors import UnsupportedModelError
from neuronrank_torch.model.blocks import Block, select_entries
from neuronrank_torch.model.experts import Experts
from neuronrank_torch.model.structure import Layer

#: Attributes with the number of experts, and of groups of them between which the router chooses first.
_COUNT = re.compile(r"(^|_)experts$")
_GROUPS = ("num_group", "n_group", "n_groups")
#: Names of modules beside the experts that are not indexed by expert.
_OTHER = re.compile(r"norm|attn|attention|mamba|conv", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Mixture(Block):
    """The routed experts of a layer, and what is indexed by expert beside them.

    Parameters
    ----------
    routing : tuple of nn.Module
        The modules that have tensors with one entry per expert, those of the experts included, and the module that
        holds them.
    fused : Experts
    """

    routing: tuple[nn.Module, ...] = ()
    fused: Experts | None = None

    @classmethod
    def of(cls, layer: Layer) -> "Mixture | None":
        """The mixture of a layer; None if it has none."""
        if layer.experts is None:
            return None
        module = layer.experts.module
        parent = next(m for m in layer.module.modules() if any(child is module for child in m.children()))
        mlps = {id(m) for mlp in layer.mlps if mlp.expert is None for m in mlp.module.modules()}
        beside = [m for name, m in parent.named_modules() if id(m) not in mlps and not _OTHER.search(name)]
        return cls(layer.index, module, layer.experts.projections(), "experts.", tuple(beside), layer.experts)

    def check_factors(self) -> None:
        """Refuse a mixture in which the outputs of the experts have no factors; raises UnsupportedModelError."""
        if self.fused is None or not self.fused.weighted:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} multiplies the inputs of its experts instead of their outputs",
                hint="its experts cannot be removed or measured yet: prune weights instead",
            )

    @property
    def experts(self) -> int:
        """Number of experts."""
        return int(self.module.down_proj.shape[0])  # type: ignore[index]

    @property
    def groups(self) -> int:
        """Number of groups of consecutive experts; 1 if the router chooses among all."""
        found = [getattr(module, name, None) for module in self.routing for name in _GROUPS]
        return next((number for number in found if number), 1)

    def indexed(self) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
        """The tensors with an entry per expert: module, name, tensor, axis."""
        for module in self.routing:
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if self.experts in tensor.shape:
                    yield module, name, tensor, tuple(tensor.shape).index(self.experts)

    def remove_experts(self, kept: Tensor) -> None:
        """Remove all other experts.

        Parameters
        ----------
        kept : int64 Tensor, shape (kept,)
            Indices of the experts to keep, ascending.
        """
        before = self.experts
        for module, name, _, axis in list(self.indexed()):
            select_entries(module, name, axis, kept)
        self.count_experts(before)

    def count_experts(self, before: int) -> None:
        """Set the numbers that the modules hold from those before to those of their tensors."""
        for module in self.routing:
            for name, value in list(vars(module).items()):
                if _COUNT.search(name) and type(value) is int and value == before:
                    setattr(module, name, self.experts)


def number_of_experts(module: Any) -> int:
    """The number of experts that a module of experts was built with."""
    return next(value for name, value in vars(module).items() if _COUNT.search(name) and type(value) is int)
