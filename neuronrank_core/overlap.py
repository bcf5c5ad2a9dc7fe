"""Agreement of two pruned versions of the same weights on which weights are zero."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Overlap:
    """Counts of zeros in two versions of ``size`` weights; adding two overlaps adds their counts.

    Parameters
    ----------
    size : int
        Weights in each version.
    zeros : tuple of int
        Zeros in the first and in the second.
    zeros_in_both : int
        Weights that are zero in both.
    jaccard : float
        Weights that are zero in both / zero in either; 1 where there is none; computed.
    kept_in_both : float
        Share of all weights that both versions keep; 1 where there are no weights; computed.
    """

    size: int = 0
    zeros: tuple[int, ...] = (0, 0)
    zeros_in_both: int = 0
    jaccard: float = field(init=False)
    kept_in_both: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "jaccard", self.zeros_in_both / self.either if self.either else 1.0)
        object.__setattr__(self, "kept_in_both", (self.size - self.either) / self.size if self.size else 1.0)

    def __add__(self, other: Overlap) -> Overlap:
        zeros = tuple(a + b for a, b in zip(self.zeros, other.zeros, strict=True))
        return Overlap(self.size + other.size, zeros, self.zeros_in_both + other.zeros_in_both)

    @property
    def either(self) -> int:
        """Weights that are zero in one version or both."""
        return sum(self.zeros) - self.zeros_in_both

    @property
    def kept_jaccard(self) -> float:
        """Weights that both keep / that either keeps; 1 if none are kept."""
        kept = self.size - self.zeros_in_both
        return (self.size - self.either) / kept if kept else 1.0

    @property
    def kept_jaccard_by_chance(self) -> float:
        """Expected :attr:`kept_jaccard` of independent masks with the same numbers of zeros."""
        if not self.size:
            return 1.0
        a, b = (1.0 - zeros / self.size for zeros in self.zeros)
        either = a + b - a * b
        return a * b / either if either else 1.0


def overlap(zero_a: Any, zero_b: Any) -> Overlap:
    """Compare two masks.

    Parameters
    ----------
    zero_a, zero_b : bool arrays of the same shape, NumPy or torch
        True where a weight is zero.
    """
    zeros = int(zero_a.sum()), int(zero_b.sum())
    return Overlap(math.prod(zero_a.shape), zeros, int((zero_a & zero_b).sum()))
