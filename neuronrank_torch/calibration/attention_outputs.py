"""Keeps what attention returns, so that later passes of the same text through the layer need not compute it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from torch import Tensor, nn

from neuronrank_torch.calibration.layerwise import replaced, split_output


class AttentionOutputs:
    """What the attention of a layer returns for the calibration text.

    Parameters
    ----------
    module : nn.Module
        The attention; its weights and inputs must be the same in all passes.
    kept : Tensor, shape (sequences, seqlen, features)
        Where the outputs are kept.
    """

    def __init__(self, module: nn.Module, kept: Tensor) -> None:
        self._module, self._kept, self._first = module, kept, 0
        self._returned: list[Any] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep the outputs of a pass."""
        with self._module.register_forward_hook(lambda module, args, output: self._keep(output)):
            yield

    def _keep(self, output: Any) -> None:
        hidden, others = split_output(output)
        room = self._kept[self._first : self._first + len(hidden)]
        if room.shape != hidden.shape or any(other is not None for other in others or ()):
            self._first = len(self._kept) + 1  # Not usable: anything else may depend on the text.
            return
        room.copy_(hidden)
        self._first += len(room)
        self._returned.append(room if others is None else (room, *others))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Return the kept outputs in passes in the same micro-batches.

        Attention is computed as always unless it returned one tensor of the expected shape for each micro-batch, and
        nothing besides but None.
        """
        returned = cycle(self._returned)
        with replaced([self._module] if self._first == len(self._kept) else [], lambda *call: next(returned)):
            yield
