"""Gram matrices of linear layers' inputs, for the weight update after masking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from neuronrank_core.errors import NonFiniteError
from neuronrank_core.statistics.table import SHARED_INPUT
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.model.blocks import Block, Mlp, by_input
from neuronrank_torch.model.early_stop import StopForward

#: Parts of a Gram matrix, summed one after another, each without what lies below it: 9/16 of the products.
_PARTS = 8


class Sums(Protocol):
    """Sums over tokens by which a block is fitted."""

    @property
    def gram(self) -> Mapping[str, Tensor]:
        """``X' X`` by the name of the input."""
        ...

    @property
    def target(self) -> Tensor | None:
        """``Y' X`` of ``down_proj``; None if Y are what its dense weights make of X."""
        ...


class DenseOutputs(ExitStack):
    """Keeps what ``down_proj`` returns in the dense layer, for a later pass over the same text; a context manager.

    Parameters
    ----------
    mlp : Mlp
    kept : Tensor, shape (sequences, seqlen, out_features)
        Where the outputs are kept, in the order of the tokens.
    """

    def __init__(self, mlp: Mlp, kept: Tensor) -> None:
        super().__init__()
        self.mlp, self.kept, self._next = mlp, kept.flatten(0, 1), 0

    def __enter__(self) -> DenseOutputs:
        self.callback(self.mlp.projections["down_proj"].on_output(self._keep).remove)
        return self

    def _keep(self, output: Tensor) -> None:
        rows = output.flatten(0, -2)
        self.take(len(rows)).copy_(rows)

    def take(self, tokens: int) -> Tensor:
        """The outputs of the next tokens, shape (tokens, out_features); from the first on again after the last."""
        first = self._next
        self._next = (first + tokens) % len(self.kept)
        return self.kept[first : first + tokens]


def add_gram(gram: Tensor, rows: Tensor) -> None:
    """Add ``X' X`` on and above the diagonal; :func:`mirrored` completes it after all rows.

    Parameters
    ----------
    gram : float32 Tensor, shape (columns, columns)
        Sum so far, changed in place. What it has below the diagonal means nothing.
    rows : float32 Tensor, shape (tokens, columns)
        X.
    """
    width = -(-len(gram) // _PARTS)
    for first in range(0, len(gram), width):
        gram[first : first + width, first:].addmm_(rows[:, first : first + width].T, rows[:, first:])


def mirrored(gram: Tensor) -> Tensor:
    """The symmetric matrix with the values that ``gram`` has on and above the diagonal."""
    return gram.triu() + gram.triu(1).T


def complete(grams: Mapping[str, Tensor], ranks: Ranks, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Gram matrices of all ranks, from what :func:`add_gram` made of the text of each.

    Parameters
    ----------
    grams : mapping of str to Tensor
        By the name of the input.
    ranks : Ranks
    blocks : sequence of Block
        Those of the layer that read the inputs; the error names it.

    Raises
    ------
    NonFiniteError
        On NaN or Inf.
    """
    if not all(bool(gram.isfinite().all()) for gram in grams.values()):
        raise NonFiniteError(f"NaN or Inf in the inputs of layer {blocks[0].where}", hint="try --dtype float32")
    return {name: mirrored(ranks.sum_in_order(gram)) for name, gram in grams.items()}


class GramCollector(ExitStack):
    """Sums ``X' X`` over the calibration tokens while they run through a layer; a context manager.

    The sums are complete after :meth:`sum_over`.

    Where a matrix has a bias, its inputs X have a last column of ones.

    Parameters
    ----------
    blocks : sequence of Block
        Blocks of the layer.
    roles : iterable of str
        Names of the inputs that are collected, if a block has them; ``SHARED_INPUT`` lists the projections that share
        them.
    outputs : DenseOutputs, optional
        Outputs Y of the dense layer's ``down_proj``. If given and ``down_proj`` is among the roles, ``target`` is
        ``Y' X``, by which ``down_proj`` can be fitted to them.
    stop : bool
        End the forward of the layer at the first of the inputs: nothing after it is needed.
    """

    def __init__(
        self, blocks: Sequence[Block], roles: Iterable[str], outputs: DenseOutputs | None = None, *, stop: bool = False
    ) -> None:
        super().__init__()
        self.blocks, self.stop = blocks, stop
        projections = [item for block in blocks for item in block.projections.items()]
        self.with_bias = {
            SHARED_INPUT.get(role, role) for role, projection in projections if projection.bias is not None
        }
        self.projections = {
            role: projection
            for block in blocks
            for role, projection in by_input(block.projections).items()
            if role in roles
        }
        self.roles = tuple(self.projections)
        self.outputs = outputs if "down_proj" in self.roles else None
        self.gram = {role: self._zeros(role, self._columns(role)) for role in self.roles}
        down = self.projections["down_proj"].weight if self.outputs is not None else None
        self.target = None if down is None else self._zeros("down_proj", len(down))

    def __enter__(self) -> GramCollector:
        for role in self.roles:
            self.callback(self.projections[role].on_input(partial(self._see, role)).remove)
        return self

    def _columns(self, role: str) -> int:
        return int(self.projections[role].weight.shape[1]) + (role in self.with_bias)

    def _zeros(self, role: str, rows: int) -> Tensor:
        return self.projections[role].weight.new_zeros(rows, self._columns(role), dtype=torch.float32)

    def sum_over(self, ranks: Ranks) -> None:
        """Add the sums of the other ranks, after all text has run; raises NonFiniteError on NaN or Inf."""
        self.gram = complete(self.gram, ranks, self.blocks)
        self.target = None if self.target is None else ranks.sum_in_order(self.target)

    def _see(self, role: str, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        rows = pad(rows, (0, 1), value=1.0) if role in self.with_bias else rows
        add_gram(self.gram[role], rows)
        if role == "down_proj" and self.target is not None and self.outputs is not None:
            self.target.addmm_(self.outputs.take(len(rows)).float().T, rows)
        if self.stop:
            raise StopForward
