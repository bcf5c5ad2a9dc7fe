"""Select the whole neurons to remove."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from neuronrank_core.errors import InvalidValueError
from neuronrank_core.kernels import Array, Vector
from neuronrank_core.methods import method_of
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.recipe import Recipe
from neuronrank_core.selection.patterns import exact_ratio, select


def removed_neurons(neurons: int, recipe: Recipe) -> int:
    """The number of neurons that go: ``int(ratio * neurons)``, or fewer, so that ``multiple_of`` divides the others.

    Raises
    ------
    InvalidValueError
        If that is none because of ``multiple_of``.
    """
    goes, multiple = int(recipe.ratio * neurons), recipe.multiple_of
    if multiple is None:
        return goes
    goes -= -(neurons - goes) % multiple
    if goes <= 0:
        allowed = f"a number with a multiple from {neurons - int(recipe.ratio * neurons)} to {neurons - 1} neurons"
        raise InvalidValueError("multiple_of", multiple, allowed, hint="lower it, or choose a larger --sparsity_ratio")
    return goes


def kept_neurons(context: ScoringContext) -> NDArray[np.int64]:
    """Indices of the kept neurons, ascending: all but the lowest scores, see :func:`removed_neurons`.

    Of equal scores the lowest index is removed first.

    Raises
    ------
    InputError
        If the method has no score for whole neurons.
    AllZeroMetricError, NonFiniteError
        If all scores are zero, or a score is NaN or Inf.
    """
    score = np.array(method_of(context.recipe).neuron_score(context), dtype=np.float64)
    return np.setdiff1d(np.arange(score.size), _lowest(score, removed_neurons(score.size, context.recipe), context))


def next_neurons(
    context: ScoringContext, weight: Array, norm: Vector, rest: Sequence[int], count: int
) -> NDArray[np.int64]:
    """Indices of the neurons to remove next: those that score lowest among the remaining ones.

    Parameters
    ----------
    context : ScoringContext
        Of the dense layer.
    weight : array, shape (out_features, neurons)
        Current weight of ``down_proj``.
    norm : ndarray, shape (neurons,)
        Replaces the norm of its inputs in the score.
    rest : sequence of int
        The remaining neurons.
    count : int
    """
    score = np.array(method_of(context.recipe).neuron_score(context.at("down_proj", weight, norm)), dtype=np.float64)
    return np.array(rest)[_lowest(score[rest], count, context)]


def _lowest(score: NDArray[np.float64], count: int, context: ScoringContext) -> NDArray[np.int64]:
    where, ratio = f"layer {context.layer} neurons", exact_ratio(count, score.size)
    return np.flatnonzero(select(score[None], np.ones((1, score.size)), ratio=ratio, compare="row", where=where)[0])
