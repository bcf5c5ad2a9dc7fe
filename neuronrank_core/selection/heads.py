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
from neuronrank_core.selection.patterns import select


def head_options(heads: int, groups: int, recipe: Recipe) -> dict[str, int]:
    """The ways in which a recipe can remove heads, and the number of heads that each removes.

    ``int(ratio * groups)`` groups go, or ``int(ratio * n)`` of the n query heads of every group. Of ``heads``, which
    leaves the way open, these are the ways that remove most.

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
    each, ratio = heads // groups, recipe.ratio
    goes = {"query-heads": groups * int(ratio * each), "key-value-groups": each * int(ratio * groups)}
    asked = [recipe.sparsity_type] if recipe.sparsity_type in goes else list(goes)
    most = max(goes[way] for way in asked)
    if most == 0:
        largest = max({"query-heads": each, "key-value-groups": groups}[way] for way in asked)
        allowed = f"at least {ceil(1e4 / largest) / 1e4:g} and below 1" if largest > 1 else "none"
        layout = f"{groups} key-value groups with {each} query heads each"
        raise InvalidValueError("sparsity_ratio", ratio, f"{allowed}, to remove {recipe.sparsity_type} of {layout}")
    return {way: goes[way] for way in asked if goes[way] == most}


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
    found = {way: _kept(score, groups, way, context) for way in head_options(len(score), groups, context.recipe)}
    return max(found.values(), key=lambda kept: float(score[kept].sum()))


def lost_share(context: ScoringContext, groups: int) -> float:
    """Share of the layer's score that the removed heads have, between 0 and 1."""
    score = np.array(method_of(context.recipe).head_score(context), dtype=np.float64)
    return float(1 - score[kept_heads(context, groups)].sum() / score.sum())


def _kept(score: NDArray[np.float64], groups: int, way: str, context: ScoringContext) -> NDArray[np.int64]:
    by_group = score.reshape(groups, -1)
    compared = by_group.sum(axis=1)[None] if way == "key-value-groups" else by_group.copy()
    where, ratio = f"layer {context.layer} heads", context.recipe.ratio
    goes = select(compared, np.ones_like(compared), ratio=ratio, compare="row", where=where)
    goes = goes.T if way == "key-value-groups" else goes
    return np.flatnonzero(~np.broadcast_to(goes, by_group.shape))
