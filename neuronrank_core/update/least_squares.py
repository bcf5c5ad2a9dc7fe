"""Weight update after masking: the remaining weights are fitted to the dense layer's outputs.

For one linear layer with inputs X (one row per token) and dense weight W, find V, zero under the mask, that
minimises ``|X V' - Y|^2``, where Y are the outputs to reproduce. Only two sums over tokens are needed: the Gram matrix
``G = X' X`` and ``T = Y' X`` (``T = W G`` if Y are the dense layer's own outputs on X).

A bias is the weight of a constant input: a last column of W, for a last column of ones in X. It is fitted with the
others and never removed.

The functions use only operators, so that they work for NumPy arrays and torch tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

from neuronrank_core.kernels import Array
from neuronrank_core.recipe import UPDATE_ITERATIONS

#: Added to the diagonal of the Gram matrix scaled to a unit diagonal, as a penalty on changes from the dense weights.
#: Keeps the solve well-posed and reduces overfitting to few calibration tokens (docs/measured/log.md).
DAMPING = 0.3
#: The same where the update chooses what to remove: less, so that inputs that replace each other are told apart better.
SELECTION_DAMPING = 0.1
#: Inputs that :func:`eliminate` chooses together.
BLOCK = 16


def gradual_shares(iterations: int = UPDATE_ITERATIONS) -> tuple[float, ...]:
    """Fraction of the final zeros that is chosen by each iteration of a gradual update.

    1 from three quarters of the iterations on, with decreasing steps up to there.
    """
    return tuple(min(1.0, (4 / 3 * i / iterations) ** (1 / 3)) for i in range(1, iterations + 1))


def row_errors(weight: Array, gram: Array, target: Array) -> Array:
    """Squared reconstruction error of each output row, up to a constant per row, shape (out_features,).

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


def residual_norm(gram: Array, inverse: Callable[[Array], Array], *, damping: float = SELECTION_DAMPING) -> Array:
    """Norm of the part of each input that the other inputs cannot replace.

    Optimal Brain Surgeon (Hassibi and Stork 1992): removing a weight ``w_k`` costs ``w_k^2 / [H^-1]_kk`` if the other
    weights of its row are re-fitted, with ``H`` the Gram matrix with damping. So ``|w_k| * residual_norm_k`` is to an
    update what Wanda's ``|w_k| * input_norm_k`` is to pruning without one.

    Parameters
    ----------
    gram, inverse
        See :func:`least_squares_update`.
    damping : float
        See :data:`SELECTION_DAMPING`.

    Returns
    -------
    array, shape (in_features,)
        ``1 / sqrt([H^-1]_kk)``; without damping, the norm of the residual of regressing input k on the others.
    """
    unit, _ = _unit_diagonal(gram)
    unit[range(len(unit)), range(len(unit))] += damping
    return (gram.diagonal() / inverse(unit).diagonal()) ** 0.5


def _unit_diagonal(gram: Array) -> tuple[Array, Array]:
    """The Gram matrix scaled to a unit diagonal, and the scale of each input; 1 for an input that is always 0."""
    scale = gram.diagonal() ** 0.5
    scale = scale + (scale == 0)
    return gram / scale / scale[:, None], scale


def least_squares_update(
    weight: Array,
    mask: Array,
    gram: Array,
    inverse: Callable[[Array], Array],
    *,
    target: Array | None = None,
    damping: float = DAMPING,
    iterations: int = UPDATE_ITERATIONS,
    stored: Callable[[Array], Array] = lambda weight: weight,
) -> Array:
    """Update the remaining weights by the alternating direction method of multipliers (ADMM).

    Boža 2024, "Fast and effective weight update for pruned large language models", arXiv 2401.02938: inputs scaled to
    a unit diagonal, penalty 1, one factorisation for all rows regardless of their masks. A row whose error the update
    does not reduce keeps its masked dense weights, so the update never increases the reconstruction error.

    Parameters
    ----------
    weight : array, shape (out_features, in_features)
        Dense weight.
    mask : bool array, same shape, or without the last columns
        True where the weight is set to zero. Columns that it does not have, such as a bias, are never set to zero.
    gram : array, shape (in_features, in_features)
        ``X' X`` of the calibration inputs, up to a scale factor.
    inverse : callable
        Inverse of a symmetric positive definite matrix, in the backend's double precision.
    target : array, shape (out_features, in_features), optional
        ``Y' X``; by default Y are the dense layer's outputs on X.
    damping : float
        See :data:`DAMPING`.
    iterations : int, >= 1
        See :data:`neuronrank_core.recipe.UPDATE_ITERATIONS`.
    stored : callable
        Rounds weights as the model does that stores them.

    Returns
    -------
    array, same shape, exactly zero under the mask
    """
    how: dict[str, Any] = {"target": target, "damping": damping, "stored": stored}
    return gradual_update(weight, lambda *_: mask, gram, inverse, shares=[1.0] * iterations, **how)


def gradual_update(
    weight: Array,
    choose: Callable[[Array, float], Array],
    gram: Array,
    inverse: Callable[[Array], Array],
    *,
    target: Array | None = None,
    damping: float = DAMPING,
    shares: Sequence[float] = gradual_shares(),
    stored: Callable[[Array], Array] = lambda weight: weight,
) -> Array:
    """Alternate between choosing weights to zero, more at every iteration, and updating the remaining ones.

    The gradual pruning of the same paper: selection uses the updated weights, so that it takes into account which
    weights already compensate for others. The mask of the last iteration is final.

    Parameters
    ----------
    weight, gram, inverse, target, damping, stored
        See :func:`least_squares_update`.
    choose : callable
        ``choose(candidate, share)`` returns the mask for this fraction of the final zeros, by the current weights, a
        bias included. Not called again once the share stops increasing.
    shares : sequence of float
        One per iteration; see :func:`gradual_shares`.

    Returns
    -------
    array, same shape, exactly zero under the last mask; no row has a larger error than the masked dense weights
    """
    own = weight @ gram
    target = own if target is None else target
    unit, scale = _unit_diagonal(gram)
    unit[range(len(unit)), range(len(unit))] += 1 + damping
    solve = inverse(unit)
    goal = target / scale + damping * weight * scale
    w, u, reached = weight * scale, weight * 0, 0.0
    for share in shares:
        v = w + u
        if share > reached:
            stays, reached = weight * 0 + 1, share
            mask = choose(v / scale, share)
            stays[:, : mask.shape[1]] = ~mask
        z = stays * v
        u = v - z
        w = (goal + z - u) @ solve
    fitted = stored(stays * (w + u) / scale)
    masked = stays * (weight * 1.0)  # Floating point, of whatever type the weight is.
    # Of the changes alone: with an input much larger than the others, rounding exceeds what the errors differ by.
    residual = target - own
    better = row_errors(fitted - weight, gram, residual) < row_errors(masked - weight, gram, residual)
    masked[better] = fitted[better]
    return masked


def linear_map(
    weight: Array, gram: Array, target: Array, inverse: Callable[[Array], Array], *, damping: float = DAMPING
) -> Array:
    """Least-squares weights that reproduce other outputs than the layer's own, with all inputs.

    Closed form: the V that minimises ``|X V' - Y|^2``, with inputs scaled to a unit diagonal and ``damping`` as a
    penalty on changes from ``weight``.

    Parameters
    ----------
    weight : array, shape (out_features, in_features)
        What V is pulled to.
    gram : array, shape (in_features, in_features)
        ``X' X``.
    target : array, shape (out_features, in_features)
        ``Y' X``.
    inverse, damping
        See :func:`absorb`.

    Returns
    -------
    array, shape (out_features, in_features)
    """
    unit, scale = _unit_diagonal(gram)
    unit[range(len(unit)), range(len(unit))] += damping
    return (target / scale + damping * weight * scale) @ inverse(unit) / scale


def eliminate(
    weight: Array,
    gram: Array,
    choose: Callable[[Array, Array, Sequence[int], int], Sequence[int]],
    count: int,
    inverse: Callable[[Array], Array],
    *,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> list[int]:
    """Choose inputs to remove, a few at a time, each time with the remaining weights re-fitted.

    The steps of Optimal Brain Surgeon, for all rows at once: re-fitting after the removal of inputs g changes the
    weights by ``-W_g ([H^-1]_gg)^-1 [H^-1]_g``, with ``H`` the Gram matrix with damping.

    Parameters
    ----------
    weight, gram, inverse, damping
        See :func:`absorb`.
    choose : callable
        ``choose(candidate, norm, rest, number)`` returns the indices of the next inputs out of ``rest``, by the current
        weights and the current :func:`residual_norm`.
    count : int
        Number of inputs to remove.
    block : int
        Number of inputs that are chosen together.

    Returns
    -------
    list of int
        The inputs, in the order in which they were chosen.
    """
    unit, scale = _unit_diagonal(gram)
    every = range(len(unit))
    unit[every, every] += damping
    left, current = inverse(unit), weight * scale
    gone: list[int] = []
    while len(gone) < count:
        norm = (gram.diagonal() / left.diagonal()) ** 0.5
        rest = sorted({*every} - {*gone})
        new = list(choose(current / scale, norm, rest, min(block, count - len(gone))))
        spread = inverse(left[new][:, new]) @ left[new]
        current = current - current[:, new] @ spread
        left = left - left[:, new] @ spread
        left[new, new] = 1  # Removed inputs are apart from all others.
        gone += new
    return gone


def absorb(
    weight: Array, kept: Array, gram: Array, inverse: Callable[[Array], Array], *, damping: float = DAMPING
) -> Array:
    """Least-squares weights of the kept inputs that reproduce the outputs of all inputs.

    Closed form with the Gram matrix ``G``: ``W_kept + W_removed G_removed,kept (G_kept,kept)^-1``. All rows lose the
    same inputs, so one solve is enough.

    Parameters
    ----------
    weight : array, shape (out_features, in_features)
        Dense weight.
    kept : int array, shape (kept,)
        Indices of the kept inputs, the constant of a bias among them.
    gram : array, shape (in_features, in_features)
        ``X' X`` of the calibration inputs.
    inverse : callable
        Inverse of a symmetric positive definite matrix, in the backend's double precision.
    damping : float
        See :data:`DAMPING`.

    Returns
    -------
    array, shape (out_features, kept)
    """
    unit, scale = _unit_diagonal(gram)
    rest = weight * scale
    rest[:, kept] = 0
    inner = unit[kept][:, kept]
    inner[range(len(kept)), range(len(kept))] += damping
    return weight[:, kept] + rest @ unit[:, kept] @ inverse(inner) / scale[kept]
