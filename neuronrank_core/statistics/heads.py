"""Attention heads as terms: their signal."""

import numpy as np
from numpy.typing import ArrayLike

from neuronrank_core.kernels import Vector


def head_signal(x: ArrayLike, o_proj: ArrayLike, heads: int) -> Vector:
    """Norm of what each head adds to the residual stream at each token.

    Parameters
    ----------
    x : array, shape (tokens, heads * head_dim)
        Input of ``o_proj``: the outputs of the heads, one after another.
    o_proj : array, shape (out_features, heads * head_dim)
        Its weight, without the bias, which belongs to no head.
    heads : int

    Returns
    -------
    float64 array, shape (tokens, heads)
    """
    outputs = np.asarray(x, dtype=np.float64).reshape(len(np.asarray(x)), heads, -1)
    weight = np.asarray(o_proj, dtype=np.float64).reshape(-1, heads, outputs.shape[2])
    return np.asarray(np.linalg.norm(np.einsum("thd,ohd->tho", outputs, weight), axis=2))
