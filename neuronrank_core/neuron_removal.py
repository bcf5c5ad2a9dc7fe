"""Whole neurons removed for good: which go, and how the rest of ``down_proj`` absorbs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuronrank_core.context import ScoringContext
from neuronrank_core.errors import AllZeroMetricError, NonFiniteError
from neuronrank_core.least_squares import DAMPING
from neuronrank_core.methods import METHODS
from neuronrank_core.selection import lowest_k

Array = Any


def kept_neurons(context: ScoringContext) -> NDArray[np.int64]:
    """Neurons that stay, ascending: all but the ``int(ratio * neurons)`` lowest scores, ties to the lowest index.

    Raises
    ------
    InputError
        If the method has no score for whole neurons.
    AllZeroMetricError, NonFiniteError
        If there is nothing to choose by.
    """
    where = f"layer {context.layer} neurons"
    score = np.asarray(METHODS[context.recipe.method].neuron_score(context), dtype=np.float64)
    if not np.isfinite(score).all():
        raise NonFiniteError(f"NaN or Inf in the scores of {where}", hint="check the weights, or lower the exponents")
    goes = int(context.recipe.ratio * len(score))
    if goes and not score.any():
        raise AllZeroMetricError(where)
    return np.flatnonzero(~lowest_k(score[None], goes)[0])


def absorb(
    weight: Array, kept: Any, gram: Array, inverse: Callable[[Array], Array], *, damping: float = DAMPING
) -> Array:
    """Least-squares weights of the kept inputs that reproduce the outputs of all of them.

    Closed form: with ``G`` the Gram matrix of the inputs, ``W_kept + W_gone G_gone,kept (G_kept,kept)^-1``. Every row
    loses the same inputs, so one solve serves all.

    Parameters
    ----------
    weight : array, shape (out_features, in_features)
        Dense weight.
    kept : int array, shape (kept,)
        Inputs that stay.
    gram : array, shape (in_features, in_features)
        ``X' X`` of the calibration inputs.
    inverse : callable
        Inverse of a symmetric positive definite matrix, in the backend's double precision.
    damping : float
        Added to the diagonal of the Gram matrix scaled to a unit diagonal, and holding the weights to their dense
        values.

    Returns
    -------
    array, shape (out_features, kept)
    """
    scale = gram.diagonal() ** 0.5
    scale = scale + (scale == 0)
    unit = gram / scale / scale[:, None]
    scaled = weight * scale
    inner = unit[kept][:, kept]
    inner[range(len(kept)), range(len(kept))] += damping
    goal = scaled @ unit[:, kept] + damping * scaled[:, kept]
    return goal @ inverse(inner) / scale[kept]
