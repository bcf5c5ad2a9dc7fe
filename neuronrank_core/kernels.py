"""Operations over tokens and weights that a backend must implement.

Everything else runs once per layer on vectors of shape (neurons,) and is implemented only in the core.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neuronrank_core.errors import InvalidValueError

#: An array of the backend: NumPy or torch.
Array = Any


class Kernels(Protocol):
    """Kernels over sampled tokens and weights; see the core functions of the same names."""

    def asarray(self, vector: NDArray[np.generic], like: Array) -> Array:
        """Convert a final vector to the library, device and precision of the scores of the weight ``like``."""
        ...

    def to_numpy(self, array: Array) -> NDArray[np.generic]:
        """The inverse of :meth:`asarray`, in the array's own precision."""
        ...

    def quantile_threshold(self, sample: NDArray[np.float32], q: float) -> NDArray[np.float32]:
        """See :func:`neuronrank_core.statistics.tfidf.quantile_threshold`."""
        ...

    def active_tokens(
        self, sample: NDArray[np.float32], tau: NDArray[np.float32], labels: NDArray[np.int64], groups: int
    ) -> Counts:
        """See :func:`neuronrank_core.statistics.tfidf.active_tokens`."""
        ...

    def group_means(self, sample: NDArray[np.float32], labels: NDArray[np.int64], groups: int) -> Vector:
        """See :func:`neuronrank_core.statistics.tfidf.group_means`."""
        ...

    def topics(self, sample: NDArray[np.float32], k: int, seed: int) -> NDArray[np.int64]:
        """See :func:`neuronrank_core.statistics.topics.topics`."""
        ...

    def column_norm(self, weight: Array) -> Vector:
        """Euclidean norm of each column of a weight, shape (in_features,)."""
        ...

    def lowest_k(self, scores: Array, k: int) -> Array:
        """See :func:`neuronrank_core.lowest_k`."""
        ...


def lowest_k(scores: ArrayLike, k: int) -> NDArray[np.bool_]:
    """Mark the k lowest scores of every row; ties go to the lowest index.

    Parameters
    ----------
    scores : array, shape (groups, size)
    k : int in [0, size]

    Returns
    -------
    bool array, shape (groups, size), with exactly k True in each row

    Raises
    ------
    InvalidValueError
        If k is out of range.
    """
    s = np.asarray(scores)
    if not 0 <= k <= s.shape[1]:
        raise InvalidValueError("k", k, f"[0, {s.shape[1]}]")
    mask = np.zeros(s.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(s, axis=1, kind="stable")[:, :k], True, axis=1)
    return mask


Vector = NDArray[np.float64]
Counts = NDArray[np.int64]
