"""Sparsity ratios per layer: higher where pruning changes the residual stream least.

The score of every MLP weight is the squared error that its removal causes at the block's output, relative to the
residual stream there. A single threshold for the whole model gives each layer its own ratio. The ratios used lie
between uniform and these, within bounds, and keep the total.

Outlier-weighed layer-wise sparsity (OWL, Yin et al. 2023, arXiv 2310.05175) has the same purpose and bounds, but ranks
layers by their share of outlying Wanda scores. It uses neither the neurons nor the norm of the residual stream.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neuronrank_core.errors import AllZeroMetricError, MissingStatisticsError, NonFiniteError
from neuronrank_core.kernels import Array
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.methods.neuronrank_wanda import neuron_strength
from neuronrank_core.methods.scoring import NEURON_AXIS, times_neuron, weight_merit

#: Interpolation between uniform ratios (0) and those of a single threshold (1), and the largest deviation from uniform.
#: Chosen on validation text (docs/measured/log.md).
BLEND, BOUND = 0.5, 0.2
#: Edges of the histogram's bins: 16 per factor of two, over the range of squared float32 values.
LOG2_EDGES: NDArray[np.float64] = np.arange(-300, 300.01, 1 / 16)


def removal_error(module: str, context: ScoringContext) -> Array:
    """Squared error that removing each single weight causes at the block's output, shape (out, in).

    For ``down_proj`` it is ``(|W| * input_rms)^2``. For gate and up it is the weight's share of the row sum of
    ``(|W| * input_rms)^2``, times the square of the neuron's strength.
    """
    square = weight_merit(context.weights[module], context.input_norm(module), input_exp=1.0) ** 2
    if NEURON_AXIS[module] == 1:
        return square
    total = square.sum(axis=1)
    strength = context.kernels.asarray(neuron_strength(context) ** 2, context.weights[module])
    return times_neuron(square, strength / (total + (total == 0)), axis=0)


def error_histogram(context: ScoringContext, residual: float) -> NDArray[np.int64]:
    """Count the MLP weights of a layer by log2 of their :func:`removal_error` relative to the residual stream.

    Parameters
    ----------
    context : ScoringContext
    residual : float
        Typical squared norm of the layer's output hidden states, divided by :func:`typical_gain` of the errors, > 0.

    Returns
    -------
    int64 array, shape (bins,)
        By :data:`LOG2_EDGES`; weights whose removal causes no error are in the first bin.

    Raises
    ------
    NonFiniteError
        If an error is NaN or Inf, or ``residual`` is not above 0.
    """
    if not 0 < residual < math.inf:
        raise NonFiniteError(
            f"the hidden states after layer {context.layer} are zero or not finite", hint="check the model's weights"
        )
    counts = harmless(0)
    for module in filter(context.weights.__contains__, NEURON_AXIS):
        error = np.asarray(context.kernels.to_numpy(removal_error(module, context)), dtype=np.float64)
        if not np.isfinite(error).all():
            raise NonFiniteError(
                f"NaN or Inf in the scores of layer {context.layer} {module}",
                hint="check the weights, or lower the exponents",
            )
        with np.errstate(divide="ignore"):
            exponent = np.log2(error.ravel() / residual).clip(LOG2_EDGES[0], LOG2_EDGES[-1])
        counts += np.histogram(exponent, LOG2_EDGES)[0]
    return counts


def harmless(weights: int) -> NDArray[np.int64]:
    """The counts of :func:`error_histogram` for weights whose removal causes no error."""
    counts = np.zeros(len(LOG2_EDGES) - 1, dtype=np.int64)
    counts[0] = weights
    return counts


def typical_square_norm(residual_norm: ArrayLike) -> float:
    """Squared median over tokens of the hidden states' norm; the mean would be dominated by outlier tokens.

    Parameters
    ----------
    residual_norm : array, shape (documents, tokens)
    """
    return float(np.quantile(np.asarray(residual_norm), 0.5, method="lower")) ** 2


def random_error(output: ArrayLike, seed: int) -> NDArray[np.float32]:
    """Random error of the output of an MLP, an eighth as large as the output at each token.

    Parameters
    ----------
    output : array, shape (tokens, hidden_size)
    seed : int
    """
    output = np.asarray(output, dtype=np.float32)
    noise = np.random.default_rng(seed).standard_normal(output.shape, dtype=np.float32)
    size = np.linalg.norm(output, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    return np.asarray(noise * size / 8)


def error_gain(change: ArrayLike, error: ArrayLike) -> float:
    """How much larger the square of an error of an MLP's output is in the layer's output.

    It is 1 where the output is added to the residual stream as it is. A norm or a factor in between changes it, as in
    Gemma 3 and Granite. Rounded to a bin of :data:`LOG2_EDGES`, so that rounding errors of the layer do not count.

    Parameters
    ----------
    change : array, shape (tokens, hidden_size)
        By which the layer's output differs because of the error.
    error : array, shape (tokens, hidden_size)

    Returns
    -------
    float
        0 if the error has no effect, 1 if there is none.
    """
    changed, made = (float(np.square(np.asarray(array, dtype=np.float64)).sum()) for array in (change, error))
    if not changed or not made:
        return 0.0 if made else 1.0
    return float(2 ** (round(16 * math.log2(changed / made)) / 16))


def typical_gain(gains: ArrayLike, layer: int | str = "?") -> float:
    """Mean :func:`error_gain` over the documents in which it was measured, those that are not NaN.

    Raises
    ------
    MissingStatisticsError
        If there are none.
    """
    gains = np.asarray(gains, dtype=np.float64)
    if np.isnan(gains).all():
        raise MissingStatisticsError(
            layer, "error_gain was measured in none of the documents", hint="collect more documents, or merge them"
        )
    return float(np.nanmean(gains))


def allocate(
    histograms: Sequence[NDArray[np.int64]],
    ratio: float,
    zeros: Callable[[int, float], int],
    *,
    blend: float = BLEND,
    bound: float = BOUND,
) -> list[float]:
    """Choose the sparsity ratio of each layer.

    Parameters
    ----------
    histograms : sequence of int64 arrays, shape (bins,)
        From :func:`error_histogram`, one per layer.
    ratio : float in [0, 1]
        Overall sparsity ratio.
    zeros : callable
        ``zeros(layer, ratio)``: number of weights removed from a layer; non-decreasing in the ratio.
    blend, bound : float
        See :data:`BLEND` and :data:`BOUND`.

    Returns
    -------
    list of float
        Between ``ratio - bound`` and ``ratio + bound``, and within [0, 1]. As many weights are removed as with a
        uniform ``ratio``, or a few less if ``zeros`` increases by more than one at a time.

    Raises
    ------
    AllZeroMetricError
        If removing weights causes no error.
    """
    counts = np.array(histograms)
    if not counts[:, 1:].any():
        raise AllZeroMetricError("the allocation between layers")
    low, high = max(0.0, ratio - bound), min(1.0, ratio + bound)
    wanted = ratio + blend * (_shares_below_one_threshold(counts, ratio) - ratio)
    layers = range(len(counts))
    target = sum(zeros(layer, ratio) for layer in layers)

    def ratios(shift: float) -> list[float]:
        return [float(r) for r in np.clip(wanted + shift, low, high)]

    def total(of: list[float]) -> int:
        return sum(zeros(layer, r) for layer, r in zip(layers, of, strict=True))

    shift = _last_at_most(lambda shift: total(ratios(shift)), target, -1.0, 1.0)
    chosen = ratios(shift)
    # Counts of several layers may increase at the same shift, so the last few weights are assigned layer by layer.
    for layer in layers:
        rest = target - total(chosen)
        if rest:
            goal = zeros(layer, chosen[layer]) + rest
            chosen[layer] = _last_at_most(lambda r, layer=layer: zeros(layer, r), goal, chosen[layer], high)  # type: ignore[misc]
    return chosen


def _shares_below_one_threshold(counts: NDArray[np.int64], ratio: float) -> NDArray[np.float64]:
    """Share of each layer's weights below the ``ratio`` quantile of all weights."""
    below = np.cumsum(counts.sum(axis=0))
    bin_ = int(np.searchsorted(below, ratio * below[-1]))
    inside = counts[:, bin_].sum()
    part = (ratio * below[-1] - (below[bin_] - inside)) / max(inside, 1)
    shares = (counts[:, :bin_].sum(axis=1) + part * counts[:, bin_]) / counts.sum(axis=1)
    return np.asarray(shares, dtype=np.float64)


def _last_at_most(count: Callable[[float], int], most: int, low: float, high: float) -> float:
    """Largest point where a non-decreasing count is at most ``most``, by bisection; ``low`` must be such a point."""
    if count(high) <= most:
        return high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if count(middle) <= most else (low, middle)
    return low
