"""NeuronRank on transformers models: the core's mathematics on tensors, layer by layer."""

from neuronrank_core import Recipe
from neuronrank_torch.pipeline import prune
from neuronrank_torch.report import Report

__all__ = ["Recipe", "Report", "prune"]
