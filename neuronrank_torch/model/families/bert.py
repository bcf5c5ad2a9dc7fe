"""BERT, RoBERTa, ELECTRA and others of their kind as decoders: a plain MLP in two modules of the layer."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(gate_proj=None, up_proj=Part("intermediate.dense"), down_proj=Part("output.dense"))
