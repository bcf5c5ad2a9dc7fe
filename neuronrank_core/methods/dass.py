"""DaSS: Guo et al. 2024, "Dependency-aware semi-structured sparsity of GLU variants in LLMs", arXiv 2405.01943.

The closest prior art to ``neuronrank_wanda``, which also uses the input norm of a weight and the norm of a neuron's
``down_proj`` column, and compares within the whole module instead of one input column. As published for unstructured
sparsity. The paper's N:M groups run along the neurons of gate and up; here, as for every method, they run along the
inputs, where the neuron's factor cancels.
"""

from neuronrank_core.kernels import Array
from neuronrank_core.methods.base import Method
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.methods.scoring import times_neuron, weight_merit
from neuronrank_core.recipe import Recipe
from neuronrank_core.statistics.table import INPUTS


class Dass(Method):
    """gate/up: ``|W| * rms(product)^tf_exp``, compared within each input column; down: Wanda."""

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
        """Within each input column for gate and up, within each output row for down."""
        return "row" if module == "down_proj" else "column"


METHOD = Dass()
