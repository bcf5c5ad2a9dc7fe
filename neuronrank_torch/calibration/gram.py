"""Gram matrices of linear layers' inputs, for the weight update after masking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from neuronrank_core.errors import NonFiniteError
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.model.blocks import Block, Mlp, by_input


class GramCollector(ExitStack):
    """Sums ``X' X`` over the calibration tokens while they run through a layer; a context manager.

    Parameters
    ----------
    blocks : sequence of Block
        Blocks of the layer.
    roles : iterable of str
        Names of the inputs that are collected; ``SHARED_INPUT`` lists the projections that share them.
    dense : Mlp, optional
        The MLP before its gate and up were pruned. If given and ``down_proj`` is among the roles, ``cross`` is
        ``H_dense' H``, by which ``down_proj`` can be fitted to the dense layer's outputs.
    """

    def __init__(self, blocks: Sequence[Block], roles: Iterable[str], dense: Mlp | None = None) -> None:
        super().__init__()
        self.blocks, self.roles, self.dense = blocks, tuple(roles), dense
        self.projections = {
            role: projection
            for block in blocks
            for role, projection in by_input(block.projections).items()
            if role in self.roles
        }
        self.gram = {role: self._zeros(role) for role in self.roles}
        self.cross = self._zeros("down_proj") if dense is not None and "down_proj" in self.roles else None
        self._expected: Tensor | None = None

    def __enter__(self) -> GramCollector:
        if self.cross is not None:
            [mlp] = [block for block in self.blocks if isinstance(block, Mlp)]
            self.callback(mlp.module.register_forward_pre_hook(self._expect, with_kwargs=True).remove)
        for role in self.roles:
            self.callback(self.projections[role].on_input(self._sum(role)).remove)
        return self

    def _zeros(self, role: str) -> Tensor:
        weight = self.projections[role].weight
        return weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float32)

    def sum_over(self, ranks: Ranks) -> None:
        """Add the sums of the other ranks, after all text has run; raises NonFiniteError on NaN or Inf."""
        if not all(bool(gram.isfinite().all()) for gram in self.gram.values()):
            raise NonFiniteError(
                f"NaN or Inf in the inputs of layer {self.blocks[0].where}", hint="try --dtype float32"
            )
        self.gram = {name: ranks.sum_in_order(gram) for name, gram in self.gram.items()}
        self.cross = None if self.cross is None else ranks.sum_in_order(self.cross)

    def _expect(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        if self.dense is not None:
            self._expected = self.dense.product(*args, **kwargs).flatten(0, -2).float()

    def _sum(self, role: str) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            x = x.flatten(0, -2).float()
            self.gram[role].addmm_(x.T, x)
            if role == "down_proj" and self.cross is not None and self._expected is not None:
                self.cross.addmm_(self._expected.T, x)

        return see
