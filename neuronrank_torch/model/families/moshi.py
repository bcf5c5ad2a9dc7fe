"""Moshi: gate and up are one matrix, under the names of a plain MLP."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(
    gate_proj=Part("fc1", 0, of=2), up_proj=Part("fc1", 1, of=2), down_proj=Part("fc2"), activation="activation_fn"
)
