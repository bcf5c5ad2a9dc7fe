"""From a layer's statistics to a layer's masks: the one path every backend takes."""

from __future__ import annotations

from neuronrank_core.context import ScoringContext
from neuronrank_core.kernels import Array
from neuronrank_core.methods import METHODS
from neuronrank_core.scoring import NEURON_AXIS
from neuronrank_core.selection import select


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
        See :func:`neuronrank_core.selection.select` and :class:`ScoringContext`.
    """
    recipe = context.recipe
    method = METHODS[recipe.method]
    if module not in NEURON_AXIS:
        method = METHODS[method.beyond_mlp]
    return select(
        method.score(module, context),
        context.weights[module],
        ratio=recipe.ratio,
        compare=recipe.compare or method.compare(module),
        pattern=recipe.pattern,
        lowest_k=context.kernels.lowest_k,
        where=f"layer {context.layer} {module}",
    )
