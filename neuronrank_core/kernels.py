"""What a backend must be able to do over tokens and weights.

Everything else runs once per layer on (neurons,)-sized vectors and lives in the core alone.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from neuronrank_core import kmeans, selection, tfidf
from neuronrank_core.tfidf import Counts, Vector

#: An array of the backend's own kind: NumPy or torch.
Array = Any


class Kernels(Protocol):
    """The kernels over sampled tokens and over weights; see the core functions of the same names."""

    def asarray(self, vector: NDArray[np.generic], like: Array) -> Array:
        """Bring a finalised vector to the library, device and precision of the scores of ``like``, a weight."""
        ...

    def to_numpy(self, array: Array) -> NDArray[np.generic]:
        """The inverse of :meth:`asarray`, in the array's own precision."""
        ...

    def quantile_threshold(self, sample: NDArray[np.float32], q: float) -> NDArray[np.float32]:
        """See :func:`neuronrank_core.tfidf.quantile_threshold`."""
        ...

    def active_tokens(
        self, sample: NDArray[np.float32], tau: NDArray[np.float32], labels: NDArray[np.int64], groups: int
    ) -> Counts:
        """See :func:`neuronrank_core.tfidf.active_tokens`."""
        ...

    def group_means(self, sample: NDArray[np.float32], labels: NDArray[np.int64], groups: int) -> Vector:
        """See :func:`neuronrank_core.tfidf.group_means`."""
        ...

    def topics(self, sample: NDArray[np.float32], k: int, seed: int) -> NDArray[np.int64]:
        """See :func:`neuronrank_core.kmeans.topics`."""
        ...

    def column_norm(self, weight: Array) -> Vector:
        """Euclidean norm of each column of a weight, shape (in_features,)."""
        ...

    def lowest_k(self, scores: Array, k: int) -> Array:
        """See :func:`neuronrank_core.lowest_k`."""
        ...


class NumpyKernels:
    """The reference."""

    quantile_threshold = staticmethod(tfidf.quantile_threshold)
    active_tokens = staticmethod(tfidf.active_tokens)
    group_means = staticmethod(tfidf.group_means)
    topics = staticmethod(kmeans.topics)
    lowest_k = staticmethod(selection.lowest_k)
    to_numpy = staticmethod(np.asarray)

    def column_norm(self, weight: Array) -> Vector:
        """Euclidean norm of each column."""
        return np.asarray(np.linalg.norm(np.asarray(weight, dtype=np.float64), axis=0))

    def asarray(self, vector: NDArray[np.generic], like: Array) -> Array:
        """Return the vector in double precision, whatever the weight's."""
        del like
        return np.asarray(vector, dtype=np.float64)
