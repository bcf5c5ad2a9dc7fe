"""GPT-J, CodeGen: a plain MLP."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(gate_proj=None, up_proj=Part("fc_in"), down_proj=Part("fc_out"))
