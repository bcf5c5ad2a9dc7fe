"""Select the attention heads to remove: the same number in every layer, as a configuration describes them.

Heads that share keys and values are a group. What stays must be as many query heads in every group, so there are two
ways: whole groups go, or as many query heads of every group.
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from neuronrank_core.errors import InvalidValueError
from neuronrank_core.methods import method_of
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.recipe import Recipe
from neuronrank_core.selection.patterns import exact_ratio, select


def head_options(heads: int, groups: int, recipe: Recipe) -> dict[str, int]:
    """The ways in which a recipe can remove heads, and the number of heads that each removes.

    ``int(ratio * groups)`` groups go, or ``int(ratio * n)`` of the n query heads of every group; or fewer, so that
    ``divisible_by`` divides the numbers of heads and of groups that stay. Of ``heads``, which leaves the way open,
    these are the ways that remove most.

    Parameters
    ----------
    heads, groups : int
        Query heads of a layer, and its key-value heads, which divide them.
    recipe : Recipe

    Raises
    ------
    InvalidValueError
        If the ratio removes no head.
    """
    each, ratio, by = heads // groups, recipe.ratio, recipe.divisible_by
    steps = head_steps(heads, groups, by)
    asked = [recipe.sparsity_type] if recipe.sparsity_type in steps else list(steps)
    parts = {"query-heads": each, "key-value-groups": groups}
    goes = {way: max((k for k in steps[way] if k <= int(ratio * parts[way])), default=0) for way in asked}
    removed = {way: k * heads // parts[way] for way, k in goes.items()}
    most = max(removed.values())
    if most == 0:
        least = min((k / parts[way] for way in asked for k in steps[way]), default=None)
        allowed = "none" if least is None else f"at least {ceil(1e4 * least) / 1e4:g} and below 1"
        layout = f"{groups} key-value groups with {each} query heads each"
        layout += f", with --divisible-by {by}" if by > 1 else ""
        raise InvalidValueError("sparsity_ratio", ratio, f"{allowed}, to remove {recipe.sparsity_type} of {layout}")
    return {way: removed[way] for way in asked if removed[way] == most}


def head_steps(heads: int, groups: int, divisible_by: int = 1) -> dict[str, list[int]]:
    """By way, the numbers that can go: of key-value groups, or of query heads of every group.

    Parameters
    ----------
    heads, groups : int
        As in :func:`head_options`.
    divisible_by : int
        What has to divide the numbers of heads and of groups that stay.
    """
    each = heads // groups
    fits = groups % divisible_by == 0
    return {
        "query-heads": [k for k in range(1, each) if fits],
        "key-value-groups": [k for k in range(1, groups) if (groups - k) % divisible_by == 0],
    }


def kept_heads(context: ScoringContext, groups: int) -> NDArray[np.int64]:
    """Indices of the kept heads, ascending; of equal scores the lowest index is removed first.

    If the recipe leaves the way open, it is the one that loses less of the layer's score.

    Parameters
    ----------
    context : ScoringContext
        Of an attention, with its number of heads.
    groups : int
        Number of its key-value heads.

    Raises
    ------
    InputError
        If the method has no score for heads, or the ratio removes none.
    AllZeroMetricError, NonFiniteError
        If all scores are zero, or a score is NaN or Inf.
    """
    score = np.array(method_of(context.recipe).head_score(context), dtype=np.float64)
    options = head_options(len(score), groups, context.recipe)
    found = {way: _kept(score, groups, way, goes, context) for way, goes in options.items()}
    return max(found.values(), key=lambda kept: float(score[kept].sum()))


def lost_share(context: ScoringContext, groups: int) -> float:
    """Share of the layer's score that the removed heads have, between 0 and 1."""
    score = np.array(method_of(context.recipe).head_score(context), dtype=np.float64)
    return float(1 - score[kept_heads(context, groups)].sum() / score.sum())


def _kept(score: NDArray[np.float64], groups: int, way: str, goes: int, context: ScoringContext) -> NDArray[np.int64]:
    by_group = score.reshape(groups, -1)
    compared = by_group.sum(axis=1)[None] if way == "key-value-groups" else by_group.copy()
    of = compared.shape[1]
    ratio, where = exact_ratio(goes * of // score.size, of), f"layer {context.layer} heads"
    gone = select(compared, np.ones_like(compared), ratio=ratio, compare="row", where=where)
    gone = gone.T if way == "key-value-groups" else gone
    return np.flatnonzero(~np.broadcast_to(gone, by_group.shape))
