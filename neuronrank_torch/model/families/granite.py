"""Granite 4 and the shared expert of Granite MoE: gate and up are one matrix, with names of their own."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(
    gate_proj=Part("input_linear", 0, of=2),
    up_proj=Part("input_linear", 1, of=2),
    down_proj=Part("output_linear"),
    activation="activation",
)
