"""GPT-NeoX, BLOOM, Falcon, Persimmon: a plain MLP."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(gate_proj=None, up_proj=Part("dense_h_to_4h"), down_proj=Part("dense_4h_to_h"))
