"""RIA: Zhang et al. 2024, "Plug-and-play: an efficient post-training pruning method for large language models" (ICLR).

As published: relative importance of a weight in its row and column, times the square root of the input norm, compared
within each output row. The paper's channel permutation for N:M is not implemented.
"""

from neuronrank_core.kernels import Array
from neuronrank_core.methods.base import Method
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.methods.scoring import power
from neuronrank_core.recipe import Recipe
from neuronrank_core.statistics.table import INPUTS


class Ria(Method):
    """``(|W| / row sum + |W| / column sum) * input_norm^input_exp``."""

    name = "ria"
    summary = "(|W| / row sum + |W| / column sum) * input_norm^0.5 within each output row"
    defaults = {"input_exp": 0.5}
    reads = frozenset({"input_exp"})

    def score(self, module: str, context: ScoringContext) -> Array:
        """Score every weight by its share of its row and column."""
        magnitude = abs(context.weights[module])
        rows, columns = magnitude.sum(axis=1, keepdims=True), magnitude.sum(axis=0, keepdims=True)
        # Avoid 0 / 0: weights of an all-zero row or column score zero.
        relative = magnitude / (rows + (rows == 0)) + magnitude / (columns + (columns == 0))
        return relative * power(context.input_norm(module), self.exponents(context.recipe).input_exp)

    def requires(self, recipe: Recipe) -> frozenset[str]:
        """Mean squares of the inputs."""
        del recipe
        return frozenset({INPUTS})

    def compare(self, module: str) -> str:
        """Within each output row."""
        del module
        return "row"


METHOD = Ria()
