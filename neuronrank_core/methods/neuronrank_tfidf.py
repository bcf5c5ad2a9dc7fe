"""The seed formula of NeuronRank: ``|W|^weight_exp * TF^tf_exp * IDF^idf_exp * spikiness^spikiness_exp``."""

from neuronrank_core.kernels import Array, Vector
from neuronrank_core.methods.base import Method
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.methods.scoring import NEURON_AXIS, times_neuron, weight_merit
from neuronrank_core.recipe import Recipe
from neuronrank_core.statistics.table import INPUTS


class NeuronRankTfidf(Method):
    """Score weights by their magnitude and by how strongly and selectively their neuron fires."""

    name = "neuronrank_tfidf"
    summary = "|W|^a * TF^b * IDF^c * spikiness^r, groups are documents or topics"
    expert_signal = True
    reads = frozenset(
        {"tfidf_mode", "tfidf_k", "q_active", "signal", "threshold", "tokens_per_document"}
        | {"weight_exp", "input_exp", "tf_exp", "idf_exp", "spikiness_exp"}
    )

    def score(self, module: str, context: ScoringContext) -> Array:
        """Score every weight of gate, up or down."""
        e, weight = self.exponents(context.recipe), context.weights[module]
        norm = context.input_norm(module) if e.input_exp else None
        merit = weight_merit(weight, norm, weight_exp=e.weight_exp, input_exp=e.input_exp)
        return times_neuron(merit, context.kernels.asarray(self.importance(context), weight), NEURON_AXIS[module])

    def neuron_score(self, context: ScoringContext) -> Vector:
        """The seed formula's neuron factor."""
        return self.importance(context)

    def head_score(self, context: ScoringContext) -> Vector:
        """The same factor, of each head."""
        return self.importance(context)

    def expert_score(self, context: ScoringContext) -> Vector:
        """The same factor, of each expert."""
        return self.importance(context)

    def head_requires(self, recipe: Recipe) -> frozenset[str]:
        """The statistics that the exponents of the factor need."""
        return self.tfidf_requires(recipe)

    def requires(self, recipe: Recipe) -> frozenset[str]:
        """The statistics that the exponents need."""
        return self.tfidf_requires(recipe) | ({INPUTS} if self.exponents(recipe).input_exp else set())


METHOD = NeuronRankTfidf()
