"""Gram matrices of linear layers' inputs, for the weight update after masking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from neuronrank_core.errors import NonFiniteError
from neuronrank_core.statistics.table import SHARED_INPUT
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.model.blocks import Block, Mlp, by_input


class GramCollector(ExitStack):
    """Sums ``X' X`` over the calibration tokens while they run through a layer; a context manager.

    Where a matrix has a bias, its inputs X have a last column of ones.

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
        self.blocks, self.roles = blocks, tuple(roles)
        self.dense = dense if "down_proj" in self.roles else None
        projections = [item for block in blocks for item in block.projections.items()]
        self.with_bias = {
            SHARED_INPUT.get(role, role) for role, projection in projections if projection.bias is not None
        }
        self.projections = {
            role: projection
            for block in blocks
            for role, projection in by_input(block.projections).items()
            if role in self.roles
        }
        self.gram = {role: self._zeros(role) for role in self.roles}
        self.cross = self._zeros("down_proj") if self.dense is not None else None

    def __enter__(self) -> GramCollector:
        if self.dense is not None:
            [mlp] = [block for block in self.blocks if isinstance(block, Mlp)]
            for module, dense in zip(mlp.producers, self.dense.producers, strict=True):
                self.callback(module.register_forward_hook(partial(_with_dense, dense)).remove)
        for role in self.roles:
            self.callback(self.projections[role].on_input(partial(self._see, role)).remove)
        return self

    def _zeros(self, role: str) -> Tensor:
        weight = self.projections[role].weight
        columns = weight.shape[1] + (role in self.with_bias)
        return weight.new_zeros(columns, columns, dtype=torch.float32)

    def sum_over(self, ranks: Ranks) -> None:
        """Add the sums of the other ranks, after all text has run; raises NonFiniteError on NaN or Inf."""
        if not all(bool(gram.isfinite().all()) for gram in self.gram.values()):
            raise NonFiniteError(
                f"NaN or Inf in the inputs of layer {self.blocks[0].where}", hint="try --dtype float32"
            )
        self.gram = {name: ranks.sum_in_order(gram) for name, gram in self.gram.items()}
        self.cross = None if self.cross is None else ranks.sum_in_order(self.cross)

    def _see(self, role: str, x: Tensor) -> Tensor | None:
        if role != "down_proj" or self.cross is None:
            rows = self._rows(role, x)
            self.gram[role].addmm_(rows.T, rows)
            return None
        x, expected = x.chunk(2)
        rows = self._rows(role, x)
        self.gram[role].addmm_(rows.T, rows)
        self.cross.addmm_(self._rows(role, expected).T, rows)
        return x

    def _rows(self, role: str, x: Tensor) -> Tensor:
        """One row per token."""
        rows = x.flatten(0, -2).float()
        return pad(rows, (0, 1), value=1.0) if role in self.with_bias else rows


def _with_dense(dense: nn.Module, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Append the dense module's output: what is between it and ``down_proj`` then computes both products."""
    del module
    return torch.cat([output, dense(args[0])])
