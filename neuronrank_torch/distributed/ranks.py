"""The interface to the processes (ranks) of a run, implemented here for a single process."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor

from neuronrank_core import InputError

T = TypeVar("T")


class Ranks:
    """The processes of a run. This class stands for a single process: every exchange returns its input.

    :class:`neuronrank_torch.distributed.process_group.ProcessGroup` stands for several. All ranks must call the methods
    in the same order, except :meth:`share` and :meth:`require_one`. Each call waits for the other ranks, and raises the
    error of a rank that has failed meanwhile.

    Attributes
    ----------
    rank, size : int
        Index of this process, from 0, and number of processes.
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that reads the text, writes the output and reports to the user."""
        return self.rank == 0

    def require_one(self, what: str) -> None:
        """Raise an InputError if there are several processes, which ``what`` cannot use."""
        if self.size > 1:
            raise InputError(f"{what} runs in a single process", hint="leave out torchrun")

    def share(self, count: int, batch_size: int) -> slice:
        """The rank's share of ``count`` items: consecutive ones, possibly none.

        Micro-batches are not split, so that every item is processed in the same batch, with the same bits as a result,
        for any number of ranks.
        """
        batches = -(-count // batch_size)
        start, stop = (min(count, batch_size * -(-batches * rank // self.size)) for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def union(self, items: list[T]) -> list[T]:
        """The items of all ranks, in rank order."""
        return items

    def from_first(self, work: Callable[[], T]) -> T:
        """Call ``work`` on the first rank only and return its result, which must be picklable, on all ranks."""
        return work()

    def sum_in_order(self, matrix: Tensor) -> Tensor:
        """Sum of the ranks' matrices of shape (rows, ...), added in rank order, so that the result is reproducible."""
        return matrix

    def agree(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Check that ``tensors`` are the same on all ranks.

        Parameters
        ----------
        what : str
            Name of the tensors, for the error.
        tensors : iterable of Tensor

        Raises
        ------
        NeuronRankError
            If they differ between ranks.
        """


#: A single process.
ALONE = Ranks()
