"""The reference kernels, in NumPy."""

import numpy as np
from numpy.typing import NDArray

from neuronrank_core.kernels import Array, Vector, lowest_k
from neuronrank_core.statistics import tfidf
from neuronrank_core.statistics import topics as kmeans


class NumpyKernels:
    """The reference implementation."""

    quantile_threshold = staticmethod(tfidf.quantile_threshold)
    active_tokens = staticmethod(tfidf.active_tokens)
    group_means = staticmethod(tfidf.group_means)
    topics = staticmethod(kmeans.topics)
    lowest_k = staticmethod(lowest_k)
    to_numpy = staticmethod(np.asarray)

    def column_norm(self, weight: Array) -> Vector:
        """Euclidean norm of each column."""
        return np.asarray(np.linalg.norm(np.asarray(weight, dtype=np.float64), axis=0))

    def asarray(self, vector: NDArray[np.generic], like: Array) -> Array:
        """Return the vector in double precision, regardless of the weight's precision."""
        del like
        return np.asarray(vector, dtype=np.float64)
