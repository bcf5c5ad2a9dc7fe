"""DaSS: Guo et al. 2024, "Dependency-aware semi-structured sparsity of GLU variants in LLMs", arXiv 2405.01943.

The closest prior art to ``neuronrank_wanda``, which differs in that a weight's input enters its score, that the
neuron's down column enters the neuron's, and that all weights of the module compete, not those of one input. As
published for unstructured sparsity; its N:M runs go along the neurons of gate and up, here, as for every method, along
the inputs, where the neuron's factor cancels.
"""

from __future__ import annotations

from neuronrank_core.kernels import Array
from neuronrank_core.methods.base import Method
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.methods.scoring import times_neuron, weight_merit
from neuronrank_core.recipe import Recipe
from neuronrank_core.statistics.table import INPUTS


class Dass(Method):
    """gate/up: ``|W| * rms(product)^tf_exp`` of the neuron, within each input column; down: Wanda."""

    name = "dass"
    summary = "|W| * rms(product)^0.5 within each input column; down: Wanda"
    defaults = {"tf_exp": 0.5}
    reads = frozenset({"tf_exp"})

    def score(self, module: str, context: ScoringContext) -> Array:
        """Score every weight of gate, up or down."""
        weight = context.weights[module]
        if module == "down_proj":
            return weight_merit(weight, context.input_norm(module), input_exp=1.0)
        strength = context.input_rms("down_proj") ** self.exponents(context.recipe).tf_exp
        return times_neuron(abs(weight), context.kernels.asarray(strength, weight), axis=0)

    def requires(self, recipe: Recipe) -> frozenset[str]:
        """Mean squares of the inputs."""
        del recipe
        return frozenset({INPUTS})

    def compare(self, module: str) -> str:
        """Each input column for gate and up, each output row for down."""
        return "row" if module == "down_proj" else "column"


METHOD = Dass()
