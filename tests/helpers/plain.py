"""Tiny models with plain MLPs: two matrices and no gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import VOCAB
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

HIDDEN, NEURONS = 32, 64
LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GPT = {"n_embd": HIDDEN, "n_inner": NEURONS, "n_layer": 2, "n_head": 4, "n_positions": 128}
XGLM = {"d_model": HIDDEN, "ffn_dim": NEURONS, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128}
OPT = {"hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": NEURONS, "num_hidden_layers": 2}
#: Configuration, and where the two matrices are in a layer.
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "opt": (OPT | {"num_attention_heads": 4, "max_position_embeddings": 128}, "fc1", "fc2"),
    "gpt2": (GPT, "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": (LLAMA, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "bloom": ({"hidden_size": HIDDEN, "n_layer": 2, "n_head": 4}, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "phi": (LLAMA, "mlp.fc1", "mlp.fc2"),
    "xglm": (XGLM, "fc1", "fc2"),
    "bert": (LLAMA | {"is_decoder": True}, "intermediate.dense", "output.dense"),
    "ctrl": ({"n_embd": HIDDEN, "dff": NEURONS, "n_layer": 2, "n_head": 4, "n_positions": 128}, "ffn.0", "ffn.2"),
    "starcoder2": (LLAMA | {"num_key_value_heads": 2}, "mlp.c_fc", "mlp.c_proj"),
}
COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
every_family = pytest.mark.parametrize("family", FAMILIES)


def plain(family: str) -> Any:
    """A model with weights and biases far from their initial values."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family][0], **COMMON))
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=HIDDEN**-0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


def matrices(model: Any, family: str) -> list[dict[str, nn.Module]]:
    """The two modules of every layer, by role."""
    parts = dict(zip(("up_proj", "down_proj"), FAMILIES[family][1:], strict=True))
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    return [{role: layer.get_submodule(path) for role, path in parts.items()} for layer in layers]


def weight_of(module: Any) -> Tensor:
    """The weight as (out_features, in_features)."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight
