"""Decoder layers as terms: their signal."""

import numpy as np
from numpy.typing import ArrayLike

from neuronrank_core.kernels import Vector
from neuronrank_core.statistics.topics import unit_rows


def layer_signal(before: ArrayLike, after: ArrayLike) -> Vector:
    """How far a layer turns the hidden state of each token: 1 - cosine, between 0 and 2; its mean is block influence.

    Computed as half the squared distance of the unit vectors, which is exact for small angles too. 1 if one of the two
    states is zero, 0 if both are.

    Men et al. 2024, "ShortGPT: layers in large language models are more redundant than you expect", arXiv 2403.03853.

    Parameters
    ----------
    before, after : array, shape (tokens, hidden_size)
        Hidden states at the layer's input and output.

    Returns
    -------
    float64 array, shape (tokens,)
    """
    x, y = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    x, y = unit_rows(x), unit_rows(y)
    apart = x.any(axis=1) != y.any(axis=1)
    return np.where(apart, 1.0, ((x - y) ** 2).sum(axis=1) / 2)
