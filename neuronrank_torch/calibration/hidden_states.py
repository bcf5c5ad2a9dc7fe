"""Hidden states of the calibration text: where they are kept, and their norms."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuronrank_torch.distributed.ranks import ALONE, Ranks

HiddenStates = Literal["memory", "disk"]


def in_file(file: Path, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Room for hidden states in a file, which is gone when nobody needs it any more."""
    size = torch.Size(shape).numel()
    if hasattr(os, "posix_fallocate"):
        # A disk that is full is an error now, and not the end of the process when the map is written to.
        with file.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(1, size * like.element_size()))
    mapped = torch.from_file(str(file), shared=True, size=size, dtype=like.dtype).view(shape)
    with suppress(OSError):  # Not POSIX: it goes with the folder.
        file.unlink()
    return mapped


#: Makes room for hidden states: called with their shape and a tensor of their precision, where the model works.
Room = Callable[[tuple[int, ...], Tensor], Tensor]


def in_memory(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Room for hidden states where the model works."""
    return like.new_empty(shape)


def room(where: HiddenStates, file: Path, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Room for hidden states in memory, or on disk in this file."""
    return in_memory(shape, like) if where == "memory" else in_file(file, shape, like)


def residual_norm(hidden: Tensor, ranks: Ranks = ALONE) -> NDArray[np.float32]:
    """Norm of the hidden states of all ranks at each token, shape (sequences, tokens)."""
    return np.asarray(torch.stack(ranks.union([sequence.float().norm(dim=-1).cpu() for sequence in hidden])))
