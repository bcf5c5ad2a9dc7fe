"""Phi-3, Phi-4, GLM: gate and up are fused in one matrix, gate above up."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(
    gate_proj=Part("gate_up_proj", 0, of=2),
    up_proj=Part("gate_up_proj", 1, of=2),
    down_proj=Part("down_proj"),
    activation="activation_fn",
)
