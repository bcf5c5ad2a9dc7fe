"""From a layer's statistics to a layer's masks: the one path every backend takes."""

from __future__ import annotations

import math

from neuronrank_core.kernels import Array
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.methods.registry import method_for
from neuronrank_core.methods.scoring import NEURON_AXIS
from neuronrank_core.recipe import Recipe
from neuronrank_core.selection.patterns import comparison_group, select


def prune_mask(module: str, context: ScoringContext, share: float = 1.0) -> Array:
    """Weights of a module that become zero.

    Parameters
    ----------
    module : str
        Key of ``context.weights``.
    context : ScoringContext
    share : float in [0, 1]
        Of the weights that are to go in the end, how many go; of N:M, N is rounded up.

    Returns
    -------
    bool array, shape (out_features, in_features); True = becomes zero

    Raises
    ------
    AllZeroMetricError, MissingStatisticsError, NonFiniteError, InvalidValueError
        See :func:`neuronrank_core.select` and :class:`ScoringContext`.
    """
    recipe, pattern = context.recipe, context.recipe.pattern
    method = method_for(module, recipe)
    ratio = context.ratio if context.ratio is not None and module in NEURON_AXIS else recipe.ratio
    return select(
        method.score(module, context),
        context.weights[module],
        ratio=ratio * share,
        compare=recipe.compare or method.compare(module),
        pattern=pattern and (math.ceil(pattern[0] * share), pattern[1]),
        lowest_k=context.kernels.lowest_k,
        where=f"layer {context.layer} {module}",
    )


def gradual_mask(module: str, context: ScoringContext, candidate: Array, share: float) -> Array:
    """Weights of a module that are zero by now, where choosing and re-fitting take turns.

    Parameters
    ----------
    module, context, share
        See :func:`prune_mask`; the context is that of the dense weights.
    candidate : array, shape (out_features, in_features)
        The module's weights as they are at the moment.

    Returns
    -------
    bool array, shape (out_features, in_features); always True where the dense weight is zero
    """
    zero = context.weights[module] == 0
    return prune_mask(module, context.at(module, candidate * ~zero), share) | zero


def target_zeros(module: str, shape: tuple[int, int], recipe: Recipe, ratio: float | None = None) -> int:
    """How many weights of a module :func:`prune_mask` marks, at the recipe's ratio by default."""
    compare = recipe.compare or method_for(module, recipe).compare(module)
    ratio = recipe.ratio if ratio is None else ratio
    size, k = comparison_group(shape, ratio=ratio, compare=compare, pattern=recipe.pattern, where=module)
    return k * (shape[0] * shape[1] // size)
