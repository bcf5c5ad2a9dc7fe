"""LLM-Pruner as a peer: its published code's choices, the size asked for, and a model that runs."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from structured import llm_pruner

CHECKOUT = os.environ.get("LLM_PRUNER_CHECKOUT")


def outside(model: Any) -> int:
    """Number of parameters outside the embeddings."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("model.embed", "lm_head")))


def llama(seed: int, groups: int = 3, heads: int = 6) -> LlamaForCausalLM:
    """A random Llama of two layers."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=4, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def published(model: Any, sequences: Tensor, ratio: float) -> None:
    """Prune the groups and neurons of the first layer by a share, with the published code."""
    root = f"{CHECKOUT}/LLMPruner"
    for name, path in (("LLMPruner", root), ("LLMPruner.pruner", f"{root}/pruner")):
        if name not in sys.modules:  # Their own __init__ imports models that transformers no longer has.
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [path]
    sys.path.append(str(CHECKOUT))
    code, pruning = (importlib.import_module(f"LLMPruner.{m}") for m in ("pruner.hf_llama_pruner", "torch_pruning"))
    layer = model.model.layers[0]
    pruner = pruning.pruner.MetaPruner(
        model, sequences, importance=code.TaylorImportance(group_reduction="sum", taylor="param_first"),
        global_pruning=False, iterative_steps=1, ch_sparsity=ratio, ignored_layers=[], channel_groups={},
        consecutive_groups={x.self_attn.k_proj: x.self_attn.head_dim for x in model.model.layers},
        customized_pruners={LlamaRMSNorm: code.hf_rmsnorm_pruner}, root_module_types=None,
        root_instances=[layer.self_attn.k_proj, layer.mlp.gate_proj],
    )  # fmt: skip
    model.zero_grad()
    model(sequences, labels=sequences).loss.backward()
    pruner.step()


@pytest.mark.skipif(not CHECKOUT, reason="LLM_PRUNER_CHECKOUT is not set to a checkout of horseee/LLM-Pruner")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("heads", [3, 6], ids=["multi-head", "grouped-query"])
def test_the_published_code_removes_the_same(seed: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = llama(seed, heads=heads), llama(seed, heads=heads)
    sequences = torch.randint(50, (3, 8))
    published(theirs, sequences, 0.4)
    monkeypatch.setattr(llm_pruner, "pruned_layers", lambda model: [model.model.layers[0]])
    monkeypatch.setattr(llm_pruner, "numbers", lambda *_: (2, 6))
    monkeypatch.setattr(llm_pruner.group_scores, "__kwdefaults__", {"published": True})
    llm_pruner.prune(ours, sequences, 0.0)
    for (name, got), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name


@pytest.fixture
def sequences() -> Tensor:
    """Random tokens."""
    return torch.randint(258, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("keep", [0.9, 0.75, 0.55])
def test_the_size_is_just_below_the_target_and_the_model_runs(family: Any, keep: float, sequences: Tensor) -> None:
    model = tiny_model(family, layers=16, hidden=32, intermediate=60)
    dense, before = outside(model), [copy.deepcopy(x) for x in model.model.layers]
    llm_pruner.prune(model, sequences, keep)
    assert keep - 13 * 3 * 32 / dense < outside(model) / dense <= keep  # One neuron of each layer.
    changed = [outside(layer) < outside(old) for layer, old in zip(model.model.layers, before, strict=True)]
    assert changed == [False] * 2 + [True] * 13 + [False]
    for old, layer in zip(before, model.model.layers, strict=True):
        if outside(layer) == outside(old):
            assert all(torch.equal(a, b) for a, b in zip(old.parameters(), layer.parameters(), strict=True))
    assert model.generate(sequences[:, :5], max_new_tokens=3, do_sample=False).shape == (2, 8)


def test_as_large_a_share_of_groups_goes_as_of_neurons_rounded_down() -> None:
    """Groups go from the point on where half of the neurons go, and more than the other layers hold is refused."""
    model = tiny_model("llama", layers=16, hidden=32, intermediate=60)
    kept = [llm_pruner.numbers(model, keep) for keep in (0.9, 0.71, 0.59, 0.57)]
    assert [groups for groups, _ in kept] == [2, 2, 1, 1]
    for groups, neurons in kept:
        assert (2 - groups) / 2 <= (60 - neurons) / 60
    with pytest.raises(NotImplementedError, match="3 layers alone"):
        llm_pruner.numbers(model, 0.25)


def test_a_group_and_neurons_without_effect_go_first(sequences: Tensor) -> None:
    """Each query head counts for the group that serves it."""
    model = llama(0)
    sequences = sequences % 50
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[:, 8:16] = 0  # Query heads 2 and 3 of group 1.
        layer.mlp.down_proj.weight.data[:, 3:6] = 0
    before = model(sequences).logits
    model(sequences, labels=sequences).loss.backward()
    for layer in model.model.layers:
        groups = llm_pruner.highest(llm_pruner.group_scores(layer.self_attn).detach(), 2)
        neurons = llm_pruner.highest(llm_pruner.neuron_scores(layer.mlp).detach(), 7)
        llm_pruner.narrow(layer, groups, neurons)
    assert outside(model) < outside(llama(0))
    torch.testing.assert_close(model(sequences).logits, before, rtol=1e-3, atol=1e-4)
