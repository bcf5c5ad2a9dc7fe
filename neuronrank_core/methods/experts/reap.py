"""REAP: Lasby et al. 2025, "REAP the experts: why pruning prevails for one-shot MoE compression", arXiv 2510.13999."""

from neuronrank_core.kernels import Vector
from neuronrank_core.methods.base import ExpertMethod
from neuronrank_core.methods.context import ScoringContext


class Reap(ExpertMethod):
    """Mean, over the tokens that are routed to an expert, of its gate times the norm of its output."""

    name = "reap"
    summary = "experts: mean of gate * norm of the output over the tokens routed to the expert"

    def expert_score(self, context: ScoringContext) -> Vector:
        """Score every expert by what it typically adds where it is used; 0 if it never is."""
        return context.expert_statistics().reap


METHOD = Reap()
