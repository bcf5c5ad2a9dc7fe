"""Select the whole neurons to remove."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuronrank_core.errors import AllZeroMetricError, NonFiniteError
from neuronrank_core.kernels import lowest_k
from neuronrank_core.methods import method_of
from neuronrank_core.methods.context import ScoringContext

Array = Any


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
    where = f"layer {context.layer} neurons"
    score = np.asarray(method_of(context.recipe).neuron_score(context), dtype=np.float64)
    if not np.isfinite(score).all():
        raise NonFiniteError(f"NaN or Inf in the scores of {where}", hint="check the weights, or lower the exponents")
    goes = int(context.recipe.ratio * len(score))
    if goes and not score.any():
        raise AllZeroMetricError(where)
    return np.flatnonzero(~lowest_k(score[None], goes)[0])
