"""The equivalence contract: which values may differ between two backends, and by how much."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neuronrank_core.kernels import Vector
from neuronrank_core.statistics.topics import topic_margins

#: Relative deviation allowed of real values, and relative margin up to which a choice is a near-tie.
RTOL = 1e-5
#: Stands for an infinite deviation, which JSON cannot represent.
LARGEST = float(np.finfo(np.float64).max)
#: Number of seeds tried to find a clustering whose updates are free of near-ties.
SEEDS = 16


@dataclass(frozen=True)
class Check:
    """One quantity of one layer, compared with the reference.

    Parameters
    ----------
    name : str
        Name of the quantity.
    worst : float
        Largest relative deviation of a real value; or the number of counts, labels or mask bits that differ and are
        not near-ties.
    limit : float
        Largest value of ``worst`` that the contract allows.
    size : int
        Number of values compared.
    near_ties : int
        Number of labels or bits that differ where the choice of the reference was a near-tie.
    margin : float
        Largest relative margin of a choice that differs.
    holds : bool
        Whether ``worst`` is within ``limit``; computed.
    """

    name: str
    worst: float
    limit: float
    size: int
    near_ties: int = 0
    margin: float = 0.0
    holds: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "holds", self.worst <= self.limit)


def real(name: str, ours: ArrayLike, reference: ArrayLike) -> Check:
    """Compare real values one by one."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        return Check(name, LARGEST, RTOL, b.size)
    # Below the smallest normal float32 there is no relative precision to keep.
    deviation = abs(a - b) / np.maximum(abs(b), np.finfo(np.float32).tiny)
    return Check(name, float(np.nan_to_num(deviation, nan=LARGEST).max(initial=0.0)), RTOL, b.size)


def counts(name: str, ours: ArrayLike, reference: ArrayLike) -> Check:
    """Compare integers, which have to be equal."""
    a, b = np.asarray(ours), np.asarray(reference)
    return Check(name, int((a != b).sum()) if a.shape == b.shape else b.size, 0, b.size)


def clear_seed(sample: NDArray[np.float32], k: int, seed: int) -> int | None:
    """The first seed from ``seed`` on whose clustering has no update that depends on a near-tie; None if none has."""
    return next((s for s in range(seed, seed + SEEDS) if topic_margins(sample, k, s)[0] > RTOL), None)


def topic_labels(
    name: str, ours: NDArray[np.int64], reference: NDArray[np.int64], margins: Vector, *, clear: bool
) -> Check:
    """Compare topics.

    Parameters
    ----------
    ours, reference : int arrays, shape (tokens,)
    margins : array, shape (tokens,)
        How clear the reference's choices were, see :func:`neuronrank_core.statistics.topics.topic_margins`.
    clear : bool
        Whether no update depends on a near-tie. Otherwise labels cannot be compared, and the check has size 0.
    """
    differ = ours != reference
    excused = differ & ((margins <= RTOL) | (not clear))
    worst = int(differ.sum() - excused.sum())
    return Check(
        name, worst, 0, len(reference) if clear else 0, int(excused.sum()), float(margins[differ].max(initial=0.0))
    )


def masks(
    name: str,
    ours: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    score: Vector,
    *,
    group: int,
    unequal: int,
) -> Check:
    """Compare masks of a module.

    Parameters
    ----------
    ours, reference : bool arrays, shape (out_features, in_features)
    score : array, same shape
        The reference's scores.
    group : int
        Weights that compete with each other, consecutive in memory.
    unequal : int
        Number of bits that differ although both backends were given equal scores; these always count.
    """
    s, goes = score.reshape(-1, group), reference.reshape(-1, group)
    differ = goes != ours.reshape(-1, group)
    last = np.where(goes, s, -np.inf).max(axis=1, keepdims=True)
    next_ = np.where(goes, np.inf, s).min(axis=1, keepdims=True)
    # How much the score would have to change for the reference to treat the weight as the other backend does.
    distance = np.where(goes, next_ - s, s - last)[differ]
    margin = distance / np.maximum(s[differ], np.finfo(np.float32).tiny)
    # Two scores that are each off by RTOL can swap if they differ by at most twice as much.
    wrong = int((margin > 2 * RTOL).sum())
    largest = float(margin.max(initial=0.0))
    return Check(name, wrong + unequal, 0, reference.size, int(differ.sum()) - wrong, largest)
