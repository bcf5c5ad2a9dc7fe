"""From a layer's statistics to a layer's masks: the one path every backend takes."""

from __future__ import annotations

from neuronrank_core.context import ScoringContext
from neuronrank_core.kernels import Array
from neuronrank_core.methods import METHODS, Method
from neuronrank_core.recipe import Recipe
from neuronrank_core.scoring import NEURON_AXIS
from neuronrank_core.selection import comparison_group, select


def prune_mask(module: str, context: ScoringContext) -> Array:
    """Weights of a module that become zero.

    Parameters
    ----------
    module : str
        Key of ``context.weights``.
    context : ScoringContext

    Returns
    -------
    bool array, shape (out_features, in_features); True = becomes zero

    Raises
    ------
    AllZeroMetricError, MissingStatisticsError, NonFiniteError, InvalidValueError
        See :func:`neuronrank_core.select` and :class:`ScoringContext`.
    """
    recipe = context.recipe
    method = method_for(module, recipe)
    return select(
        method.score(module, context),
        context.weights[module],
        ratio=context.ratio if context.ratio is not None and module in NEURON_AXIS else recipe.ratio,
        compare=recipe.compare or method.compare(module),
        pattern=recipe.pattern,
        lowest_k=context.kernels.lowest_k,
        where=f"layer {context.layer} {module}",
    )


def method_for(module: str, recipe: Recipe) -> Method:
    """The method that scores a module: the recipe's for the MLP, its ``beyond_mlp`` for attention and head."""
    method = METHODS[recipe.method]
    return method if module in NEURON_AXIS else METHODS[method.beyond_mlp]


def target_zeros(module: str, shape: tuple[int, int], recipe: Recipe, ratio: float | None = None) -> int:
    """How many weights of a module :func:`prune_mask` marks, at the recipe's ratio by default."""
    compare = recipe.compare or method_for(module, recipe).compare(module)
    ratio = recipe.ratio if ratio is None else ratio
    size, k = comparison_group(shape, ratio=ratio, compare=compare, pattern=recipe.pattern, where=module)
    return k * (shape[0] * shape[1] // size)
