"""LFM2: LLaMA's matrices by the names of Meta's own code."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(gate_proj=Part("w1"), up_proj=Part("w3"), down_proj=Part("w2"))
