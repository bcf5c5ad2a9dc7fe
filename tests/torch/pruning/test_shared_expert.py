"""A shared expert beside routed ones is pruned as the MLP that it is."""

import copy

import numpy as np
import pytest
import torch
from pruning import pruned, recipe, seen
from tiny import VOCAB
from torch import nn
from transformers import AutoModelForCausalLM, GraniteMoeSharedConfig, PreTrainedConfig, Qwen2MoeConfig

from neuronrank_core import UnsupportedModelError
from neuronrank_torch import find_decoder

COMMON = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
}
CONFIGS = {
    "qwen2_moe": Qwen2MoeConfig(**COMMON, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=48),
    "granitemoeshared": GraniteMoeSharedConfig(**COMMON, num_local_experts=4, shared_intermediate_size=48),
}


def model_of(config: PreTrainedConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", ["wanda", "neuronrank_tfidf"])
def test_every_matrix_is_half_zeros(family: str, method: str) -> None:
    model = model_of(CONFIGS[family])
    report = pruned(model, recipe(method=method))
    for layer in report.layers:
        assert {f"shared_expert.{role}_proj" for role in ("gate", "up", "down")} <= layer.modules.keys()
        assert all(abs(m.sparsity - 0.5) < 0.01 for m in layer.modules.values())


@pytest.mark.parametrize("family", CONFIGS)
def test_its_mask_is_wanda_s_of_all_tokens(family: str) -> None:
    chosen = recipe(method="wanda", propagate="dense")
    dense = model_of(CONFIGS[family])
    model = copy.deepcopy(dense)
    pruned(model, chosen, batch_size=4)
    for before, after in zip(find_decoder(dense).layers, find_decoder(model).layers, strict=True):
        down = before.mlps[-1].projections["down_proj"]
        [(x, _)] = seen(dense, [down.module], chosen)
        rms = x.flatten(0, 1).double().square().mean(0).sqrt().numpy()
        score = abs(down.weight.double().numpy()) * rms
        expected = np.argsort(np.argsort(score, axis=1), axis=1) < score.shape[1] // 2
        assert ((after.mlps[-1].weights["down_proj"] == 0).numpy() != expected).mean() < 0.005


def test_a_part_that_nobody_knows_is_refused_by_name() -> None:
    model = model_of(CONFIGS["qwen2_moe"])
    model.model.layers[1].mlp.extra_expert = nn.Linear(32, 32)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 .* cannot be pruned: mlp\.extra_expert"):
        find_decoder(model)
