"""Weight update after masking: the weights that stay are re-fitted to the dense layer's outputs.

For one linear layer with inputs X (one token a row) and dense weight W, find V, zero where the mask says so, that
minimises ``|X V' - Y|^2``, where Y are the outputs to reproduce. Only two sums over tokens enter: the Gram matrix
``G = X' X`` and ``T = Y' X`` (``T = W G`` where Y are the dense layer's own outputs on X).

The functions use operators alone, so that the same lines update NumPy arrays and torch tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Array = Any
#: ADMM iterations; the error has levelled off by then.
ITERATIONS = 20
#: Added to the diagonal of the Gram matrix scaled to a unit diagonal, and holding the weights to their dense values:
#: keeps the solve well-posed and, with few calibration tokens, the update from fitting noise (docs/measured/log.md).
DAMPING = 0.3
#: Of the weights that are to go, how many are chosen at each iteration of a gradual update: all of them after three
#: quarters of the iterations, and the nearer to that the fewer at a time.
SHARES = tuple(min(1.0, (4 / 3 * i / ITERATIONS) ** (1 / 3)) for i in range(1, ITERATIONS + 1))


def row_errors(weight: Array, gram: Array, target: Array) -> Array:
    """Squared reconstruction error of each output row, up to a constant of the row, shape (out_features,).

    Parameters
    ----------
    weight : array, shape (out_features, in_features)
        Candidate V.
    gram : array, shape (in_features, in_features)
        ``X' X``.
    target : array, shape (out_features, in_features)
        ``Y' X``.
    """
    return ((weight @ gram - 2 * target) * weight).sum(axis=1)


def least_squares_update(
    weight: Array,
    mask: Array,
    gram: Array,
    inverse: Callable[[Array], Array],
    *,
    target: Array | None = None,
    damping: float = DAMPING,
    iterations: int = ITERATIONS,
) -> Array:
    """Re-fit the weights that stay, by the alternating direction method of multipliers.

    Boža 2024, "Fast and effective weight update for pruned large language models", arXiv 2401.02938: inputs scaled to
    a unit diagonal, penalty 1, one factorisation for all rows whatever their masks. A row whose error the update does
    not lower keeps its weights, so the layer's reconstruction error never grows.

    Parameters
    ----------
    weight : array, shape (out_features, in_features)
        Dense weight.
    mask : bool array, same shape
        True where the weight becomes zero.
    gram : array, shape (in_features, in_features)
        ``X' X`` of the calibration inputs; its scale does not matter.
    inverse : callable
        Inverse of a symmetric positive definite matrix, in the backend's double precision.
    target : array, shape (out_features, in_features), optional
        ``Y' X`` where Y are not the dense layer's outputs on X.
    damping : float
        See :data:`DAMPING`.
    iterations : int, >= 1
        See :data:`ITERATIONS`.

    Returns
    -------
    array, same shape, exactly zero under the mask
    """
    shares = [1.0] * iterations
    return gradual_update(weight, lambda *_: mask, gram, inverse, target=target, damping=damping, shares=shares)


def gradual_update(
    weight: Array,
    choose: Callable[[Array, float], Array],
    gram: Array,
    inverse: Callable[[Array], Array],
    *,
    target: Array | None = None,
    damping: float = DAMPING,
    shares: Sequence[float] = SHARES,
) -> Array:
    """Choose weights and re-fit those that stay in turn, a few more at every iteration.

    The gradual pruning of the same paper: a weight whose work others have taken over by now is chosen, and one that
    has taken over work stays. The mask of the last iteration is final.

    Parameters
    ----------
    weight, gram, inverse, target, damping
        See :func:`least_squares_update`.
    choose : callable
        ``choose(candidate, share)`` is the mask, by the weights as they are at that moment, of this share of all that
        are to go. Not asked again where the share no longer grows.
    shares : sequence of float
        One an iteration; see :data:`SHARES`.

    Returns
    -------
    array, same shape, exactly zero under the last mask, and in no row with a larger error than the dense weights
    under it
    """
    target = weight @ gram if target is None else target
    scale = gram.diagonal() ** 0.5
    scale = scale + (scale == 0)
    unit = gram / scale / scale[:, None]
    diagonal = unit * 0
    diagonal[range(len(unit)), range(len(unit))] = 1
    solve = inverse(unit + (1 + damping) * diagonal)
    goal = target / scale + damping * weight * scale
    w, u, reached = weight * scale, weight * 0, 0.0
    for share in shares:
        if share > reached:
            stays, reached = weight * 0 + 1, share
            stays[choose((w + u) / scale, share)] = 0
        z = stays * (w + u)
        u = u + w - z
        w = (goal + z - u) @ solve
    fitted = stays * (w + u) / scale
    masked = stays * weight
    better = row_errors(fitted, gram, target) < row_errors(masked, gram, target)
    masked[better] = fitted[better]
    return masked


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
