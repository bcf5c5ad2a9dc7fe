"""Decoder layers as terms: their signal."""

import numpy as np
from numpy.typing import ArrayLike

from neuronrank_core.kernels import Vector


def layer_signal(before: ArrayLike, after: ArrayLike) -> Vector:
    """How far a layer turns the hidden state of each token: 1 - cosine, between 0 and 2; its mean is block influence.

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
    return np.asarray(1 - (x * y).sum(axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)))
