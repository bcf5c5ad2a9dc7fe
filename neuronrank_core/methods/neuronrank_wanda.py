"""NeuronRank's main method: Wanda's ranking within a neuron, scaled between neurons by the neuron's strength.

Wanda compares within rows, where a factor per output neuron cancels. Here rows are normalised to mean 1 and compared
over the whole module, so that strong neurons keep more weights. ``tf_exp = 0`` weights all neurons equally.
``dass.py`` implements the closest prior art and describes the differences.
"""

from neuronrank_core.kernels import Array, Vector
from neuronrank_core.methods.base import Method
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.methods.scoring import normalise, times_neuron, weight_merit
from neuronrank_core.recipe import Recipe
from neuronrank_core.statistics.table import INPUTS, SIGNAL


class NeuronRankWanda(Method):
    """gate/up: normalised ``|W| * input_norm`` times the neuron's importance; down: Wanda."""

    name = "neuronrank_wanda"
    summary = "Wanda within a neuron, strength^b * IDF^c * spikiness^r between neurons"
    defaults = {"input_exp": 1.0, "tf_exp": 0.5, "idf_exp": 0.0}
    expert_defaults = {"idf_exp": 0.5}  # docs/measured/expert-removal.md
    expert_mode = "topic"
    reads = frozenset(
        {"tfidf_mode", "tfidf_k", "q_active", "signal", "threshold", "tokens_per_document"}
        | {"weight_exp", "input_exp", "tf_exp", "idf_exp", "spikiness_exp"}
    )

    def score(self, module: str, context: ScoringContext) -> Array:
        """Score every weight of gate, up or down."""
        e, weight = self.exponents(context.recipe), context.weights[module]
        norm = context.input_norm(module)
        merit = weight_merit(weight, norm, weight_exp=e.weight_exp, input_exp=e.input_exp)
        if module == "down_proj":
            return merit
        importance = context.kernels.asarray(self.neuron_score(context), weight)
        return times_neuron(normalise(merit), importance, axis=0)

    def neuron_score(self, context: ScoringContext) -> Vector:
        """Score every neuron by how much of the block's output passes through it, and how selectively."""
        return self.importance(context, neuron_strength(context))

    def head_score(self, context: ScoringContext) -> Vector:
        """Score every head by the root mean square of what it adds, and how selectively."""
        return self.importance(context, context.contribution() ** 0.5)

    def expert_score(self, context: ScoringContext) -> Vector:
        """Score every expert by the norm of what it adds, as a mean over topics, and how selectively."""
        return self.importance(context, context.expert_statistics(self.mode_in(context.recipe)).contribution)

    def head_requires(self, recipe: Recipe) -> frozenset[str]:
        """Moments of the signal, and the statistics that IDF and spikiness need."""
        return self.tfidf_requires(recipe, tf_from_signal=False) | {SIGNAL}

    def requires(self, recipe: Recipe) -> frozenset[str]:
        """Mean squares of the inputs, and the statistics that IDF and spikiness need."""
        return self.tfidf_requires(recipe, tf_from_signal=False) | {INPUTS}

    def compare(self, module: str) -> str:
        """Within the whole module for gate and up, within each output row for down."""
        return "row" if module == "down_proj" else "module"


def neuron_strength(context: ScoringContext) -> Vector:
    """Contribution of each neuron to the block's output: norm of its ``down_proj`` input * norm of its column there."""
    norm = context.norms["down_proj"] if "down_proj" in context.norms else context.input_rms("down_proj")
    return norm * context.kernels.column_norm(context.weights["down_proj"])


METHOD = NeuronRankWanda()
