"""Who takes part in a run: one process, or several (ranks) that share its text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The processes of a run. This one runs alone, so that every exchange is the identity.

    :class:`neuronrank_torch.distributed.process_group.ProcessGroup` is several. But for :meth:`share`, all
    ranks have to call a method in the same order; each call waits for the others, and raises the error of one that
    failed meanwhile.

    Attributes
    ----------
    rank, size : int
        Number of this process, from 0, and how many there are.
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that reads the text, writes and talks to the user."""
        return self.rank == 0

    def share(self, count: int, batch_size: int) -> slice:
        """Which of ``count`` items are this rank's: consecutive ones, maybe none.

        Micro-batches stay whole, so that every item goes through the model in the same company, and comes out with the
        same bits, whatever the number of ranks.
        """
        batches = -(-count // batch_size)
        start, stop = (min(count, batch_size * -(-batches * rank // self.size)) for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def union(self, items: list[T]) -> list[T]:
        """The items of all ranks, in rank order."""
        return items

    def from_first(self, work: Callable[[], T]) -> T:
        """Have ``work`` done by the first rank alone; all get its result, which has to be picklable."""
        return work()

    def sum_in_order(self, matrix: Tensor) -> Tensor:
        """Sum of the ranks' matrices, added in rank order: the same bits on every rank and in every repetition."""
        return matrix

    def agree(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Check that ``tensors`` are the same on all ranks.

        Raises
        ------
        NeuronRankError
            If they are not; ``what`` says what they are.
        """


#: The process that runs alone.
ALONE = Ranks()
