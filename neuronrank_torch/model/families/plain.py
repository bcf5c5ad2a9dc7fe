"""Nemotron, Arcee, Apertus, Jais 2, MPT: a plain MLP with LLaMA's names."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(gate_proj=None, up_proj=Part("up_proj"), down_proj=Part("down_proj"))
