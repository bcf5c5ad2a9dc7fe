"""Magnitude: Han et al. 2015, "Learning both weights and connections for efficient neural networks"."""

import numpy as np

from neuronrank_core.kernels import Array, Vector
from neuronrank_core.methods.base import Method
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.recipe import Recipe


class Magnitude(Method):
    """``|W|``, compared within the module."""

    name = "magnitude"
    summary = "|W|; needs no calibration text"
    beyond_mlp = "magnitude"

    def score(self, module: str, context: ScoringContext) -> Array:
        """Score every weight by its magnitude."""
        return abs(context.weights[module])

    def neuron_score(self, context: ScoringContext) -> Vector:
        """Score every neuron by the product of the norms of its rows in gate and up and its column in ``down_proj``."""
        score = context.kernels.column_norm(context.weights["down_proj"])
        for module in ("gate_proj", "up_proj"):
            if module in context.weights:
                score = score * context.kernels.column_norm(context.weights[module].T)
        return np.asarray(score)

    def head_score(self, context: ScoringContext) -> Vector:
        """Score every head by the sum of squares of its columns in ``o_proj``."""
        columns = context.kernels.column_norm(context.weights["o_proj"])
        return np.asarray((columns**2).reshape(context.heads or 1, -1).sum(axis=1))

    def requires(self, recipe: Recipe) -> frozenset[str]:
        """No statistics."""
        del recipe
        return frozenset()


METHOD = Magnitude()
