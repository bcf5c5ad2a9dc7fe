"""LLaMA, Mistral, Qwen, Gemma, SmolLM and most others: separate modules for gate, up and down."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(gate_proj=Part("gate_proj"), up_proj=Part("up_proj"), down_proj=Part("down_proj"))
