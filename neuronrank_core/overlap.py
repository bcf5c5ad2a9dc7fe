"""Agreement of two pruned versions of the same weights on which weights are zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Overlap:
    """Counts of zeros in two versions of ``size`` weights; adding two overlaps adds their counts.

    Parameters
    ----------
    size : int
        Weights in each version.
    zeros_a, zeros_b : int
        Zeros in the first and in the second.
    both : int
        Weights that are zero in both.
    """

    size: int = 0
    zeros_a: int = 0
    zeros_b: int = 0
    both: int = 0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(
            self.size + other.size,
            self.zeros_a + other.zeros_a,
            self.zeros_b + other.zeros_b,
            self.both + other.both,
        )

    @property
    def either(self) -> int:
        """Weights that are zero in one version or both."""
        return self.zeros_a + self.zeros_b - self.both

    @property
    def jaccard(self) -> float:
        """Weights that are zero in both / zero in either; 1 if there are none."""
        return self.both / self.either if self.either else 1.0

    @property
    def kept_in_both(self) -> float:
        """Share of all weights that both versions keep; 1 if there are no weights."""
        return (self.size - self.either) / self.size if self.size else 1.0

    @property
    def kept_jaccard(self) -> float:
        """Weights that both keep / that either keeps; 1 if none are kept."""
        kept = self.size - self.both
        return (self.size - self.either) / kept if kept else 1.0

    @property
    def kept_jaccard_by_chance(self) -> float:
        """Expected :attr:`kept_jaccard` of independent masks with the same numbers of zeros."""
        if not self.size:
            return 1.0
        a, b = 1.0 - self.zeros_a / self.size, 1.0 - self.zeros_b / self.size
        either = a + b - a * b
        return a * b / either if either else 1.0


def overlap(zero_a: Any, zero_b: Any) -> Overlap:
    """Compare two masks.

    Parameters
    ----------
    zero_a, zero_b : bool arrays of the same shape, NumPy or torch
        True where a weight is zero.
    """
    both = zero_a & zero_b
    return Overlap(zero_a.shape[0] * zero_a.shape[1], int(zero_a.sum()), int(zero_b.sum()), int(both.sum()))
