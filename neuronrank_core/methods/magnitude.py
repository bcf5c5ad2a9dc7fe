"""Magnitude: Han et al. 2015, "Learning both weights and connections for efficient neural networks"."""

from neuronrank_core.kernels import Array
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

    def requires(self, recipe: Recipe) -> frozenset[str]:
        """No statistics."""
        del recipe
        return frozenset()


METHOD = Magnitude()
