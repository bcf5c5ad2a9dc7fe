"""Frequency: how often the router chooses an expert.

The baseline of Muzio et al. 2024, "SEER-MoE: sparse expert efficiency through regularization for mixture-of-experts",
arXiv 2404.05089, there called actual counting.
"""

from neuronrank_core.kernels import Vector
from neuronrank_core.methods.base import ExpertMethod
from neuronrank_core.methods.context import ScoringContext


class ExpertFrequency(ExpertMethod):
    """Share of the tokens that are routed to an expert."""

    name = "expert_frequency"
    summary = "experts: share of the tokens routed to the expert"

    def expert_score(self, context: ScoringContext) -> Vector:
        """Score every expert by how often it is used."""
        return context.expert_statistics().frequency


METHOD = ExpertFrequency()
