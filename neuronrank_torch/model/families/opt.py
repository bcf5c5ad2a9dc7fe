"""OPT, Phi, XGLM, BioGPT: a plain MLP; in OPT and others its matrices are attributes of the decoder layer."""

from neuronrank_torch.model.families.layout import MlpLayout, Part

LAYOUT = MlpLayout(gate_proj=None, up_proj=Part("fc1"), down_proj=Part("fc2"))
