"""Select the experts to remove: the same number in every layer, as a configuration describes them."""

from math import ceil

import numpy as np
from numpy.typing import NDArray

from neuronrank_core.errors import InvalidValueError
from neuronrank_core.methods import method_of
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.recipe import Recipe
from neuronrank_core.selection.patterns import select


def removed_experts(experts: int, groups: int, recipe: Recipe) -> int:
    """The number of experts that go: ``int(ratio * n)`` of the n experts of every group.

    Parameters
    ----------
    experts : int
        Experts of a layer.
    groups : int
        Groups of consecutive experts between which the router chooses first; 1 if it does not.
    recipe : Recipe

    Raises
    ------
    InvalidValueError
        If the ratio removes no expert.
    """
    each = experts // groups
    goes = int(recipe.ratio * each)
    if goes == 0:
        allowed = f"at least {ceil(1e4 / each) / 1e4:g} and below 1" if each > 1 else "none"
        layout = f"{experts} experts" + (f" in {groups} groups" if groups > 1 else "")
        raise InvalidValueError("sparsity_ratio", recipe.ratio, f"{allowed}, to remove one of {layout}")
    return groups * goes


def kept_experts(context: ScoringContext, groups: int = 1) -> NDArray[np.int64]:
    """Indices of the kept experts, ascending; of equal scores the lowest index is removed first.

    Parameters
    ----------
    context : ScoringContext
        Of a mixture, with its number of experts.
    groups : int
        See :func:`removed_experts`.

    Raises
    ------
    InputError
        If the method has no score for experts.
    AllZeroMetricError, NonFiniteError
        If all scores are zero, or a score is NaN or Inf.
    """
    score = np.array(method_of(context.recipe).expert_score(context), dtype=np.float64).reshape(groups, -1)
    where, ratio = f"layer {context.layer} experts", context.recipe.ratio
    goes = select(score, np.ones_like(score), ratio=ratio, compare="row", where=where)
    return np.flatnonzero(~goes.ravel())
