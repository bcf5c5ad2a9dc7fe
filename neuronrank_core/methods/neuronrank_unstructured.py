"""Variance-weighted magnitude: neurons whose signal varies keep more of their weights.

In the additive form of an earlier implementation (``|W| + variance``), the variance is constant within a neuron, so
whole neurons were removed (perplexity 63158). Here the variance is a factor instead.
"""

from neuronrank_core.kernels import Array, Vector
from neuronrank_core.methods.base import Method
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.methods.scoring import NEURON_AXIS, times_neuron, weight_merit
from neuronrank_core.recipe import Recipe
from neuronrank_core.statistics.table import SIGNAL


class NeuronRankUnstructured(Method):
    """``|W|^weight_exp * (magnitude_multi + variance_multi * variance^variance_exp)``."""

    name = "neuronrank_unstructured"
    summary = "|W|^a * (magnitude_multi + variance_multi * variance^variance_exp)"
    reads = frozenset({"weight_exp", "magnitude_multi", "variance_multi", "variance_exp", "token_weight", "signal"})

    def score(self, module: str, context: ScoringContext) -> Array:
        """Score every weight of gate, up or down."""
        weight = context.weights[module]
        importance = self.neuron_score(context)
        merit = weight_merit(weight, None, weight_exp=self.exponents(context.recipe).weight_exp)
        return times_neuron(merit, context.kernels.asarray(importance, weight), NEURON_AXIS[module])

    def neuron_score(self, context: ScoringContext) -> Vector:
        """Score every neuron by how much its signal varies."""
        r = context.recipe
        return r.magnitude_multi + r.variance_multi * self.neurons(context).variance ** r.variance_exp

    def head_score(self, context: ScoringContext) -> Vector:
        """The same, of each head."""
        return self.neuron_score(context)

    def requires(self, recipe: Recipe) -> frozenset[str]:
        """Moments of the signal."""
        del recipe
        return frozenset({SIGNAL})


METHOD = NeuronRankUnstructured()
