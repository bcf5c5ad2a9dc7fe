"""CTRL: a plain MLP in a Sequential."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(gate_proj=None, up_proj=Part("ffn.0"), down_proj=Part("ffn.2"))
