"""GPT-2 (its Conv1D stores transposed matrices), GPT-Neo, GPT-BigCode, StarCoder 2: a plain MLP."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(gate_proj=None, up_proj=Part("c_fc"), down_proj=Part("c_proj"))
