"""Compute a layer's masks from its statistics; used by every backend."""

import math

from neuronrank_core.kernels import Array
from neuronrank_core.methods import method_for
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.methods.scoring import NEURON_AXIS
from neuronrank_core.recipe import Recipe
from neuronrank_core.selection.patterns import comparison_group, select

#: Part of the zeros of ``down_proj`` that ``--allocate modules`` moves to gate and up (docs/measured/log.md).
DOWN_LESS = 0.12


def prune_mask(module: str, context: ScoringContext, share: float = 1.0) -> Array:
    """Choose the weights of a module to zero.

    Parameters
    ----------
    module : str
        Key of ``context.weights``.
    context : ScoringContext
    share : float in [0, 1]
        Fraction of the final number of zeros to choose; for N:M, N is rounded up.

    Returns
    -------
    bool array, shape (out_features, in_features); True = is set to zero

    Raises
    ------
    AllZeroMetricError, MissingStatisticsError, NonFiniteError, InvalidValueError
        See :func:`neuronrank_core.select` and :class:`ScoringContext`.
    """
    return mask_by(method_for(module, context.recipe).score(module, context), module, context, share)


def mask_by(score: Array, module: str, context: ScoringContext, share: float = 1.0) -> Array:
    """Choose the weights of a module to zero by given scores, of the shape of ``context.weights[module]``.

    Parameters
    ----------
    score : array, shape (out_features, in_features)
        May be overwritten.
    module, context, share
        See :func:`prune_mask`.
    """
    recipe, pattern = context.recipe, context.recipe.pattern
    ratio = context.ratio if context.ratio is not None and module in NEURON_AXIS else recipe.ratio
    ratio = module_ratio(module, ratio, recipe, gated="gate_proj" in context.weights)
    return select(
        score,
        context.weights[module],
        ratio=ratio * share,
        compare=recipe.compare or method_for(module, recipe).compare(module),
        pattern=pattern and (math.ceil(pattern[0] * share), pattern[1]),
        lowest_k=context.kernels.lowest_k,
        where=f"layer {context.layer} {module}",
    )


def gradual_mask(module: str, context: ScoringContext, input_norm: Array, candidate: Array, share: float) -> Array:
    """Choose the weights of a module to zero at one iteration of a gradual update.

    Parameters
    ----------
    module, context, share
        See :func:`prune_mask`; the context holds the dense weights.
    input_norm : array, shape (in_features,)
        Replaces the input norm in the method's score: :func:`neuronrank_core.update.least_squares.residual_norm`.
    candidate : array, shape (out_features, in_features) or (out_features, in_features + 1)
        Current weights of the module; a bias in a last column is not scored.

    Returns
    -------
    bool array, shape (out_features, in_features); always True where the dense weight is zero
    """
    zero = context.weights[module] == 0
    return prune_mask(module, context.at(module, candidate[:, : zero.shape[1]] * ~zero, input_norm), share) | zero


def module_ratio(module: str, ratio: float, recipe: Recipe, *, gated: bool) -> float:
    """Share of a module's weights to zero, at a ratio of the whole MLP.

    With ``allocate`` set to ``modules`` or ``both``, ``down_proj`` gives :data:`DOWN_LESS` of its zeros to the other
    matrices of the MLP, which have the same size.

    Parameters
    ----------
    module : str
    ratio : float in [0, 1]
    recipe : Recipe
    gated : bool
        Whether the MLP has a ``gate_proj``.
    """
    if not recipe.differs_by_module or module not in NEURON_AXIS:
        return ratio
    others = 2 if gated else 1
    moved = min(DOWN_LESS * ratio, others * (1 - ratio))
    return ratio - moved if module == "down_proj" else ratio + moved / others


def target_zeros(
    module: str,
    shape: tuple[int, int],
    recipe: Recipe,
    ratio: float | None = None,
    zero: Array | None = None,
    *,
    gated: bool = True,
) -> int:
    """Number of weights of a module that :func:`prune_mask` marks, by default at the recipe's ratio.

    With ``zero``, which says where the weights are zero already: number of zeros afterwards. It is larger where a
    comparison group has more zeros than are to be marked.
    """
    compare = recipe.compare or method_for(module, recipe).compare(module)
    ratio = module_ratio(module, recipe.ratio if ratio is None else ratio, recipe, gated=gated)
    size, k = comparison_group(shape, ratio=ratio, compare=compare, pattern=recipe.pattern, where=module)
    if zero is None:
        return k * (shape[0] * shape[1] // size)
    groups = (zero.T if compare == "column" and recipe.pattern is None else zero).reshape(-1, size)
    return int(groups.sum(1).clip(min=k).sum())
