"""Select the whole neurons to remove."""

import numpy as np
from numpy.typing import NDArray

from neuronrank_core.methods import method_of
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.selection.patterns import select


def kept_neurons(context: ScoringContext) -> NDArray[np.int64]:
    """Indices of the kept neurons, ascending: all but the ``int(ratio * neurons)`` lowest scores.

    Of equal scores the lowest index is removed first.

    Raises
    ------
    InputError
        If the method has no score for whole neurons.
    AllZeroMetricError, NonFiniteError
        If all scores are zero, or a score is NaN or Inf.
    """
    score = np.array(method_of(context.recipe).neuron_score(context), dtype=np.float64)[None]
    where, ratio = f"layer {context.layer} neurons", context.recipe.ratio
    return np.flatnonzero(~select(score, np.ones_like(score), ratio=ratio, compare="row", where=where)[0])
