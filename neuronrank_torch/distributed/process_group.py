"""Several processes on torch.distributed, started by torchrun, here or on several machines.

Every exchange begins with a meeting: each rank says how many bytes it brings, or that it has failed. A rank that fails
between two exchanges goes to the next one with its error, which then ends all of them; so nobody is left waiting, and
the first rank can tell the user. A rank that dies without a word is noticed by its closed connections.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from neuronrank_core.errors import NeuronRankError, add_note
from neuronrank_torch.distributed.ranks import ALONE, Ranks, T

#: What torchrun, or whatever else starts the processes, sets.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: How long to wait for a rank that is alive but does not come: longer than any may be ahead of another.
PATIENCE = timedelta(minutes=30)
#: The same where the user wants the run to end.
INTERRUPTED = timedelta(seconds=5)
#: How long the others stay when a run has failed: launchers end the first rank in its last words when one is gone.
LAST_WORDS = timedelta(seconds=10)
#: Integers as wide as the elements of a tensor, by bytes.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def launched() -> AbstractContextManager[Ranks]:
    """The ranks that torchrun started together with this process; this process alone where it did not."""
    several = all(name in os.environ for name in ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1
    return ProcessGroup() if several else nullcontext(ALONE)


class LostContactError(NeuronRankError):
    """Another rank cannot be reached."""


class ProcessGroup(Ranks):
    """The default process group of torch.distributed as a context manager.

    NumPy and CPU tensors go by gloo, CUDA tensors by nccl. An exception that leaves the context on one rank is raised
    on the first rank too, with a note that says whose it is; the other ranks leave with ``SystemExit`` and its exit
    code, without a word.

    Raises
    ------
    NeuronRankError
        On entering, if the processes do not find each other.
    """

    def __enter__(self) -> ProcessGroup:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise NeuronRankError(
                f"the processes of this run do not find each other: {error}",
                hint="check the address, the port and the network interface (GLOO_SOCKET_IFNAME)",
            ) from error
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._over = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, SystemExit) and exit_code(error) == 0:
            error = None
        try:
            # Where all went well too: the first may still be writing, and all end well or none does.
            if not self._over:
                self._meet(failure=error)
        except BaseException as other:
            error = other
        if error is None:
            dist.destroy_process_group()
        elif self.first:
            raise error
        else:
            with suppress(RuntimeError):  # It comes when the first has gone.
                dist.irecv(torch.empty(1), src=0).wait(LAST_WORDS)  # type: ignore[union-attr]
            raise SystemExit(exit_code(error)) from error

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Where an error leaves the ranks out of step, so that there is no more talking."""
        try:
            yield
        except RuntimeError as error:
            self._over = True
            raise LostContactError(
                "another process of this run has died or cannot be reached",
                hint="see what it or its launcher printed; a process that was killed may have run out of memory",
            ) from error
        except BaseException:
            self._over = True
            raise

    def _meet(self, length: int = 0, failure: BaseException | None = None) -> list[int]:
        """Wait for the others, and learn how many bytes each brings; or raise what another failed with."""
        message = b"" if failure is None else portable(failure)
        patience = PATIENCE if failure is None or isinstance(failure, Exception) else INTERRUPTED
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        with self._talking():
            # A length below 0 is that of an error.
            dist.all_gather(lengths, torch.tensor([-len(message) or length]), async_op=True).wait(patience)
            brought = [int(length) for length in lengths]
            failed = next((rank for rank, length in enumerate(brought) if length < 0), None)
            if failed is None:
                return brought
            self._over = True
            message = self._broadcast(message, -brought[failed], failed)
        if failed != self.rank:
            error: BaseException = pickle.loads(message)
            add_note(error, f"this happened on rank {failed} of {self.size}")
            raise error
        return brought

    def _broadcast(self, data: bytes, length: int, rank: int) -> bytes:
        buffer = as_bytes(data) if rank == self.rank else torch.empty(length, dtype=torch.uint8)
        dist.broadcast(buffer, rank)
        return buffer.numpy().tobytes()

    def union(self, items: list[T]) -> list[T]:
        """See :class:`Ranks`; the items have to be picklable."""
        data = pickle.dumps(items)
        lengths = self._meet(len(data))
        with self._talking():
            mine = torch.zeros(max(lengths), dtype=torch.uint8)
            mine[: len(data)] = as_bytes(data)
            parts = [torch.empty_like(mine) for _ in lengths]
            dist.all_gather(parts, mine)
        loaded = [pickle.loads(part[:length].numpy().tobytes()) for part, length in zip(parts, lengths, strict=True)]
        return [item for part in loaded for item in part]

    def from_first(self, work: Callable[[], T]) -> T:
        """See :class:`Ranks`."""
        data = pickle.dumps(work()) if self.first else b""
        lengths = self._meet(len(data))
        with self._talking():
            data = self._broadcast(data, lengths[0], 0)
        result: T = pickle.loads(data)
        return result

    def sum_in_order(self, matrix: Tensor) -> Tensor:
        """See :class:`Ranks`; each rank adds up a band of rows, so that as little moves as in a ring."""
        rows = -(-len(matrix) // self.size)
        padded = matrix.new_zeros(self.size * rows, *matrix.shape[1:])
        padded[: len(matrix)] = matrix
        parts = torch.empty_like(padded)
        self._meet()
        with self._talking():
            dist.all_to_all_single(parts, padded)
            total, *others = parts.view(self.size, rows, -1)
            for other in others:
                total += other
            dist.all_gather([*padded.view(self.size, rows, -1)], total)
        return padded[: len(matrix)]

    def agree(self, what: str, tensors: Iterable[Tensor]) -> None:
        """See :class:`Ranks`; compared by sums of their bits."""
        sums = self.union([[int(tensor.view(_BITS[tensor.itemsize]).sum(dtype=torch.int64)) for tensor in tensors]])
        other = next((rank for rank, of_rank in enumerate(sums) if of_rank != sums[0]), None)
        if other is not None:
            raise NeuronRankError(
                f"{what} came out otherwise on rank {other} than on rank 0",
                hint="give every process the same model, the same versions and the same kind of device",
            )


def as_bytes(data: bytes) -> Tensor:
    """A uint8 tensor that holds a copy of ``data``."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def portable(error: BaseException) -> bytes:
    """Pickle an exception; one that would not come back as it was goes as a :class:`NeuronRankError` that says it."""
    with suppress(Exception):
        data = pickle.dumps(error)
        if str(pickle.loads(data)) == str(error):
            return data
    plain = NeuronRankError(str(error), hint=getattr(error, "hint", ""))
    plain.exit_code = exit_code(error)
    return pickle.dumps(plain)


def exit_code(error: BaseException) -> int:
    """What a process that ends by an exception exits with."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
