"""Several processes on torch.distributed, started by torchrun on one machine or several.

Every exchange starts with a synchronisation: each rank announces the size of its data in bytes, or that it has failed.
A rank that fails between two exchanges sends its error in the next one, which ends all ranks. So no rank waits
forever, and the first rank can report the error. A rank that is killed is noticed by its closed connections.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from neuronrank_core.errors import NeuronRankError, add_note
from neuronrank_torch.distributed.launcher import several
from neuronrank_torch.distributed.ranks import ALONE, Ranks, T

#: How long to wait for a rank that is alive: longer than any rank can be ahead of another.
TIMEOUT = timedelta(minutes=30)
#: The same after an interrupt.
INTERRUPT_TIMEOUT = timedelta(seconds=5)
#: How long the other ranks stay after a failure: launchers kill the first rank, while it reports, when another ends.
REPORT_TIMEOUT = timedelta(seconds=10)
#: Integer type of the same width as the elements of a tensor, by their size in bytes.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def launched() -> AbstractContextManager[Ranks]:
    """Context with the ranks that torchrun started; with this process alone if it was started without a launcher."""
    return ProcessGroup() if several() else nullcontext(ALONE)


class ProcessGroup(Ranks):
    """The default process group of torch.distributed as a context manager.

    NumPy arrays and CPU tensors are sent with gloo, CUDA tensors with nccl; if there are more processes on a machine
    than GPUs, with gloo by way of the CPU, as nccl needs a GPU for each. An exception that leaves the context on one
    rank is raised on the first rank too, with a note that names the rank. The other ranks exit silently with
    ``SystemExit`` and the same exit code.

    Raises
    ------
    NeuronRankError
        On entering, if the processes cannot connect to each other.
    """

    def __enter__(self) -> ProcessGroup:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        #: Whether tensors of a GPU are sent from the GPU.
        self._direct = cuda and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self._direct else "gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise NeuronRankError(
                f"the processes of this run cannot connect to each other: {error}",
                hint="check the address, the port and the network interface (GLOO_SOCKET_IFNAME)",
            ) from error
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._broken = False
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SystemExit) and exit_code(error) == 0:
            error = None
        try:
            # After success too: if the first rank fails to save the output, all ranks must fail.
            if not self._broken:
                self._synchronise(failure=error)
        except BaseException as other:
            error = other
        if error is None:
            dist.destroy_process_group()
        elif self.first:
            raise error
        else:
            with suppress(RuntimeError):  # Raised when the first rank has exited.
                dist.irecv(torch.empty(1), src=0).wait(REPORT_TIMEOUT)  # type: ignore[union-attr]
            raise SystemExit(exit_code(error)) from error

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Context of a collective operation: after an error in it, the ranks are out of step and cannot communicate."""
        try:
            yield
        except BaseException as error:
            self._broken = True
            if not isinstance(error, RuntimeError):
                raise
            raise NeuronRankError(
                "another process of this run has died or cannot be reached",
                hint="check what that process and its launcher printed; a killed process may have run out of memory",
            ) from error

    def _synchronise(self, length: int = 0, failure: BaseException | None = None) -> list[int]:
        """Wait for the other ranks; return how many bytes each will send, or raise the error of one that failed."""
        message = b"" if failure is None else portable(failure)
        timeout = TIMEOUT if failure is None or isinstance(failure, Exception) else INTERRUPT_TIMEOUT
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        with self._exchange():
            # A negative length announces an error.
            dist.all_gather(lengths, torch.tensor([-len(message) or length]), async_op=True).wait(timeout)
            sizes = [int(length) for length in lengths]
            failed = next((rank for rank, length in enumerate(sizes) if length < 0), None)
            if failed is None:
                return sizes
            self._broken = True
            message = self._broadcast(message, -sizes[failed], failed)
        if failed != self.rank:
            error: BaseException = pickle.loads(message)
            add_note(error, f"this happened on rank {failed} of {self.size}")
            raise error
        return sizes

    def _broadcast(self, data: bytes, length: int, rank: int) -> bytes:
        buffer = as_bytes(data) if rank == self.rank else torch.empty(length, dtype=torch.uint8)
        dist.broadcast(buffer, rank)
        return buffer.numpy().tobytes()

    def union(self, items: list[T]) -> list[T]:
        """See :class:`Ranks`. The items must be picklable."""
        data = pickle.dumps(items)
        lengths = self._synchronise(len(data))
        with self._exchange():
            mine = as_bytes(data.ljust(max(lengths)))
            parts = [torch.empty_like(mine) for _ in lengths]
            dist.all_gather(parts, mine)
        # pickle ignores what follows its data.
        return [item for part in parts for item in pickle.loads(part.numpy().data)]

    def from_first(self, work: Callable[[], T]) -> T:
        """See :class:`Ranks`."""
        data = pickle.dumps(work()) if self.first else b""
        lengths = self._synchronise(len(data))
        with self._exchange():
            data = self._broadcast(data, lengths[0], 0)
        result: T = pickle.loads(data)
        return result

    def sum_in_order(self, matrix: Tensor) -> Tensor:
        """See :class:`Ranks`. Each rank adds up one band of rows, which transfers as little data as a ring."""
        rows = -(-len(matrix) // self.size)
        # Zeros of the device from which the matrix is sent.
        padded = matrix.new_zeros(self.size * rows, *matrix.shape[1:], device=None if self._direct else "cpu")
        padded[: len(matrix)] = matrix
        parts = torch.empty_like(padded)
        self._synchronise()
        with self._exchange():
            dist.all_to_all_single(parts, padded)
            total, *others = parts.view(self.size, rows, -1)
            for other in others:
                total += other
            dist.all_gather([*padded.view(self.size, rows, -1)], total)
        return padded[: len(matrix)].to(matrix.device)

    def agree(self, what: str, tensors: Iterable[Tensor]) -> None:
        """See :class:`Ranks`. Compares sums of the tensors' bits."""
        sums = self.union([[int(tensor.view(_BITS[tensor.itemsize]).sum(dtype=torch.int64)) for tensor in tensors]])
        other = next((rank for rank, of_rank in enumerate(sums) if of_rank != sums[0]), None)
        if other is not None:
            raise NeuronRankError(
                f"{what} differs between rank 0 and rank {other}",
                hint="use the same model, the same versions and the same kind of device in every process",
            )


def as_bytes(data: bytes) -> Tensor:
    """Copy of ``data`` as a uint8 tensor, shape (bytes,)."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def portable(error: BaseException) -> bytes:
    """Pickle an exception; one that pickle cannot restore becomes a :class:`NeuronRankError` with the same text."""
    with suppress(Exception):
        data = pickle.dumps(error)
        if str(pickle.loads(data)) == str(error):
            return data
    plain = NeuronRankError(str(error), hint=getattr(error, "hint", ""))
    plain.exit_code = exit_code(error)
    return pickle.dumps(plain)


def exit_code(error: BaseException) -> int:
    """Exit code of a process that an exception ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
