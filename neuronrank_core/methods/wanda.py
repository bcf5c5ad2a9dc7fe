"""Wanda: Sun et al. 2023, "A simple and effective pruning approach for large language models", arXiv 2306.11695."""

from neuronrank_core.kernels import Array, Vector
from neuronrank_core.methods.base import Method
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.methods.scoring import weight_merit
from neuronrank_core.recipe import Recipe
from neuronrank_core.statistics.table import INPUTS, SIGNAL


class Wanda(Method):
    """``|W| * input_norm``, compared within each output row."""

    name = "wanda"
    summary = "|W| * input_norm within each output row"

    def score(self, module: str, context: ScoringContext) -> Array:
        """Score every weight by its typical contribution to its output."""
        return weight_merit(context.weights[module], context.input_norm(module), input_exp=1.0)

    def requires(self, recipe: Recipe) -> frozenset[str]:
        """Mean squares of the inputs."""
        del recipe
        return frozenset({INPUTS})

    def head_score(self, context: ScoringContext) -> Vector:
        """Score every head by the mean square of what it adds."""
        return context.contribution()

    def head_requires(self, recipe: Recipe) -> frozenset[str]:
        """Moments of the signal."""
        del recipe
        return frozenset({SIGNAL})

    def compare(self, module: str) -> str:
        """Within each output row."""
        del module
        return "row"


METHOD = Wanda()
