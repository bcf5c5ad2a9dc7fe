"""ModernBERT's decoder: gate and up are one matrix, gate above up."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(gate_proj=Part("Wi", 0, of=2), up_proj=Part("Wi", 1, of=2), down_proj=Part("Wo"), activation="act")
