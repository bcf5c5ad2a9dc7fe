"""Copies the tensors of the next unit to a GPU while the current unit is at work."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

_NO_ROOM = torch.cuda.OutOfMemoryError


class ReadAhead:
    """Reads tensors in a thread, and copies them from pinned memory on a stream of its own.

    Parameters
    ----------
    device : torch.device
        On CUDA, copies do not wait for the kernels of the current stream, nor these for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        stream: Any = torch.cuda.Stream
        self._stream: Any = stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._started: tuple[object, Future[dict[str, Tensor]]] | None = None

    def start(self, unit: object, dtypes: Mapping[str, torch.dtype], read: Callable[[str], Tensor]) -> None:
        """Begin to copy a unit's tensors, each read by its name, in these precisions."""
        self._started = unit, self._thread.submit(self._copy, dict(dtypes), read)

    def take(self, unit: object) -> dict[str, Tensor]:
        """The tensors of a unit, by name, if its copy was the last to begin, otherwise none. Waits for the thread.

        Kernels that are started afterwards see the tensors complete. Raises what reading raised.
        """
        if self._started is None:
            return {}
        (started, copy), self._started = self._started, None
        tensors = copy.result()  # The thread ends in any case, so that nothing else reads the source at the same time.
        if started != unit:
            return {}
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for tensor in tensors.values():
                tensor.record_stream(current)
        return tensors

    def _copy(self, dtypes: dict[str, torch.dtype], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        copies = {}
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream), suppress(_NO_ROOM):
            for name, dtype in dtypes.items():
                tensor = read(name).to(dtype)
                pinned = tensor if self._stream is None else tensor.pin_memory()
                # Torch reuses pinned memory only when the stream has copied it.
                copies[name] = pinned.to(self.device, non_blocking=True, copy=True)
            return copies
        return {}  # Without room for two, a layer is read when its turn comes.
