"""Hidden states of the calibration text: their storage and norms."""

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
    """Allocate hidden states in a memory-mapped file, which is deleted when no longer used."""
    size = torch.Size(shape).numel()
    if hasattr(os, "posix_fallocate"):
        # Reserve the space now: a full disk then raises an error, instead of killing the process on a later write.
        with file.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(1, size * like.element_size()))
    mapped = torch.from_file(str(file), shared=True, size=size, dtype=like.dtype).view(shape)
    with suppress(OSError):  # Outside POSIX, the file is deleted with its folder.
        file.unlink()
    return mapped


#: Allocates hidden states, given their shape and a tensor with their precision on the model's device.
Room = Callable[[tuple[int, ...], Tensor], Tensor]


def in_memory(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Allocate hidden states on the model's device."""
    return like.new_empty(shape)


def room(where: HiddenStates, file: Path, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Allocate hidden states in memory, or on disk in the given file."""
    return in_memory(shape, like) if where == "memory" else in_file(file, shape, like)


def residual_norm(hidden: Tensor, ranks: Ranks = ALONE) -> NDArray[np.float32]:
    """Norm of the hidden states of all ranks at each token, shape (sequences, tokens)."""
    return np.asarray(torch.stack(ranks.union([sequence.float().norm(dim=-1).cpu() for sequence in hidden])))
