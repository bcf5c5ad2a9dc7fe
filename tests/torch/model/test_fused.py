"""A family that holds gate and up in one matrix is pruned as its twin that holds them apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pruning import pruned, recipe
from tiny import VOCAB
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from neuronrank_torch import find_decoder

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
}
APART = {"gate_up_proj": ("gate_proj", "up_proj"), "qkv_proj": ("q_proj", "k_proj", "v_proj")}


@pytest.fixture(scope="module")
def twins() -> tuple[nn.Module, nn.Module]:
    """A Phi-3, and a LLaMA with the same weights in matrices of their own."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        fused, apart = Phi3ForCausalLM(Phi3Config(**SHAPE)), LlamaForCausalLM(LlamaConfig(**SHAPE))
        weights: dict[str, torch.Tensor] = {}
        for name, weight in fused.state_dict().items():
            module = name.split(".")[-2]
            parts = APART.get(module, (module,))
            weights |= {name.replace(module, part): w for part, w in zip(parts, weight.chunk(len(parts)), strict=True)}
        apart.load_state_dict(weights)
    return fused.eval(), apart.eval()


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "wanda"},
        {},
        {"method": "neuronrank_tfidf", "tfidf_mode": "topic", "signal": "activated"},
        {"sparsity_type": "2:4", "update": "gradual"},
        {"sparsity_type": "neurons", "sparsity_ratio": 0.25, "update": "least-squares"},
        {"allocate": "neuronrank"},
    ],
    ids=str,
)
def test_a_fused_mlp_is_pruned_as_its_twin(twins: tuple[nn.Module, nn.Module], chosen: dict[str, Any]) -> None:
    fused, apart = map(copy.deepcopy, twins)
    tokens = torch.arange(40)[None]
    reports = [pruned(model, recipe(**chosen)) for model in (fused, apart)]
    assert reports[0].total.zeros == reports[1].total.zeros
    assert reports[0].total.removed == reports[1].total.removed
    for a, b in zip(find_decoder(fused).layers, find_decoder(apart).layers, strict=True):
        for role, weight in b.mlp.weights.items():
            assert torch.equal(a.mlp.weights[role] == 0, weight == 0)
            torch.testing.assert_close(a.mlp.weights[role], weight, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(fused(tokens).logits, apart(tokens).logits, rtol=1e-4, atol=1e-5)
