"""Heads removed for good: the same function as zeroing their columns of o_proj, in an ordinary smaller model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruning import TEXT, pruned, random_model, recipe, same_state, small, state
from tiny import BOS, EOS, VOCAB, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    Qwen2Config,
)

from neuronrank_core import InputError
from neuronrank_core.statistics.heads import head_signal
from neuronrank_core.statistics.layers import layer_signal
from neuronrank_torch import kernels
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.pruning.scope import planned_layers
from neuronrank_torch.pruning.sparsity_types import sparsity_type_of
from neuronrank_torch.text.sequences import calibration_sequences

TOKENS = torch.arange(2, 66).view(2, 32)
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 36,
    "intermediate_size": 20,
    "vocab_size": VOCAB,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
}


def biased() -> nn.Module:
    """Three groups of three heads, with biases, whose width is not that of the hidden states."""
    return random_model(
        LlamaConfig(**SIZES, num_attention_heads=9, num_key_value_heads=3, head_dim=6, attention_bias=True)
    )


def derived() -> nn.Module:
    """The size of a head is not in the configuration."""
    return random_model(Qwen2Config(**SIZES, num_attention_heads=6, num_key_value_heads=3))


def with_sinks() -> nn.Module:
    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 6}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16}
    return random_model(GptOssConfig(**SIZES, **heads, **experts))


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: small(name) for name in ("llama", "mistral", "qwen3", "gemma3", "granite")},
    "biased": biased,
    "derived": derived,
    "sinks": with_sinks,
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def removed_heads(dense: nn.Module, smaller: nn.Module, layer: int) -> list[int]:
    """The heads of a dense layer whose columns of o_proj the smaller one no longer has."""
    big, left = (model.model.layers[layer].self_attn for model in (dense, smaller))
    columns = {tuple(column) for column in left.o_proj.weight.T.tolist()}
    size = big.head_dim
    by_head = [list(map(tuple, part.T.tolist())) for part in big.o_proj.weight.split(size, dim=1)]
    return [head for head, own in enumerate(by_head) if columns.isdisjoint(own)]


@pytest.mark.parametrize("way", ["key-value-groups", "query-heads"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_zeroed_columns(name: str, way: str, tmp_path: Path) -> None:
    dense = MODELS[name]()
    model = copy.deepcopy(dense)
    heads, groups = dense.config.num_attention_heads, dense.config.num_key_value_heads
    size = dense.model.layers[0].self_attn.head_dim
    pruned(model, recipe(sparsity_type=way, sparsity_ratio=0.5, method="wanda"))
    goes = groups // 2 * (heads // groups) if way == "key-value-groups" else heads // groups // 2 * groups
    assert model.config.num_attention_heads == heads - goes
    assert model.config.num_key_value_heads == (groups - groups // 2 if way == "key-value-groups" else groups)
    assert model.config.head_dim == size
    for layer in range(2):
        gone = removed_heads(dense, model, layer)
        assert len(gone) == goes
        for head in gone:
            dense.model.layers[layer].self_attn.o_proj.weight.data[:, head * size : (head + 1) * size] = 0
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("way", ["key-value-groups", "query-heads"])
def test_loaded_model_writes_with_its_cache_what_it_writes_without(way: str, tmp_path: Path) -> None:
    model = biased()
    pruned(model, recipe(sparsity_type=way, update="least-squares"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(TOKENS[:1], **how), loaded.generate(TOKENS[:1], use_cache=False, **how))


@torch.no_grad()
def test_the_heads_that_add_least_go() -> None:
    dense = biased()
    chosen = recipe(sparsity_type="query-heads", sparsity_ratio=1 / 3, method="wanda")
    seen: list[torch.Tensor] = []
    attention = dense.model.layers[0].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for sequence in calibration_sequences(tiny_tokenizer(), chosen, TEXT):
        dense(sequence[None])
    hook.remove()
    inputs = torch.cat(seen).double()
    added = []
    for head in range(9):
        alone = torch.zeros_like(inputs)
        alone[:, 6 * head : 6 * head + 6] = inputs[:, 6 * head : 6 * head + 6]
        added.append((alone @ attention.o_proj.weight.double().T).square().sum().item())
    expected = [min(range(first, first + 3), key=lambda head: added[head]) for first in (0, 3, 6)]
    model = copy.deepcopy(dense)
    pruned(model, chosen)
    assert removed_heads(dense, model, 0) == expected


@pytest.mark.parametrize(
    ("weak", "way", "gone"),
    [((3, 4, 5), "key-value-groups", [3, 4, 5]), ((2, 4, 6), "query-heads", [2, 4, 6])],
)
@pytest.mark.parametrize("method", ["neuronrank_wanda", "magnitude"])
def test_the_scores_of_all_layers_decide_the_way(weak: tuple[int, ...], way: str, gone: list[int], method: str) -> None:
    dense = biased()
    for layer in dense.model.layers:
        for head in weak:
            layer.self_attn.o_proj.weight.data[:, 6 * head : 6 * head + 6] *= 0.01
    model = copy.deepcopy(dense)
    report = pruned(model, recipe(sparsity_type="heads", sparsity_ratio=0.34, method=method))
    assert report.recipe.sparsity_type == way
    assert [removed_heads(dense, model, layer) for layer in range(2)] == [gone, gone]
    what = "whole key-value groups" if way == "key-value-groups" else "query heads of every group"
    groups = 2 if way == "key-value-groups" else 3
    assert f"the scores chose {what}: every layer keeps 6 of 9 attention heads, in {groups} groups" in report.notes


@pytest.mark.parametrize("backwards", [False, True])
def test_one_layer_does_not_decide_for_the_others(backwards: bool) -> None:
    dense = biased()
    # One layer alone would lose a group: 0.24 of its score, not 0.33. The other would lose 0.33, not 0.
    layers = [layer.self_attn.o_proj.weight.data for layer in dense.model.layers]
    first, second = reversed(layers) if backwards else layers
    first[:, 18:36] *= 0.8
    for head in (2, 4, 6):
        second[:, 6 * head : 6 * head + 6] *= 0.001
    report = pruned(dense, recipe(sparsity_type="heads", sparsity_ratio=0.34, method="magnitude"))
    assert report.recipe.sparsity_type == "query-heads"


def test_signals_are_those_of_the_core() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, y = (torch.randn(shape, generator=generator) for shape in ((7, 12), (5, 12), (7, 12)))
    heads = head_signal(x.numpy(), weight.numpy(), 3)
    torch.testing.assert_close(
        kernels.head_signal(x[None], weight, 3)[0].double(), torch.tensor(heads), rtol=1e-5, atol=0
    )
    x[5], y[5:] = 0, 0  # One of the two is zero, or both are.
    for bad in (float("nan"), float("inf")):
        broken = y.clone()
        broken[0, 3] = bad
        assert kernels.layer_signal(x, broken)[0].isnan()
        assert np.isnan(layer_signal(x.numpy(), broken.numpy())[0])
    for after in (y, x + 0.01 * y):
        layer = layer_signal(x.numpy(), after.numpy())
        torch.testing.assert_close(kernels.layer_signal(x, after).double(), torch.tensor(layer), rtol=1e-5, atol=0)


def test_update_changes_o_proj_alone_and_brings_the_layer_closer() -> None:
    dense = biased()
    plain, updated = copy.deepcopy(dense), copy.deepcopy(dense)
    chosen: dict[str, Any] = {"sparsity_type": "query-heads", "nsamples": 32}
    outputs = {}
    for name, model in (("none", plain), ("least-squares", updated)):
        pruned(model, recipe(**chosen, sparsity_ratio=0.34, update=name))
    for name, model in (("dense", dense), ("none", plain), ("least-squares", updated)):
        hook = model.model.layers[0].self_attn.register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output[0]})
        )
        tokens = torch.tensor(tiny_tokenizer()(TEXT[:512]).input_ids[:256]).view(8, 32)
        with torch.no_grad():
            model(tokens)
        hook.remove()
    a, b = (model.model.layers[0].self_attn for model in (plain, updated))
    for role in ("q_proj", "k_proj", "v_proj"):
        assert same_state(state(getattr(a, role)), state(getattr(b, role)))
    assert not torch.equal(a.o_proj.weight, b.o_proj.weight)
    assert not torch.equal(a.o_proj.bias, b.o_proj.bias)
    error = {name: (output - outputs["dense"]).norm() for name, output in outputs.items()}
    assert error["least-squares"] < 0.9 * error["none"]


def test_report_counts_what_is_gone() -> None:
    model = biased()
    before = sum(p.numel() for p in model.parameters())
    report = pruned(model, recipe(sparsity_type="key-value-groups", sparsity_ratio=0.34))
    # A third of q, k, v and o, of 36 inputs or outputs each.
    assert [layer.modules["q_proj"].removed for layer in report.layers] == [18 * 36] * 2
    assert report.total.removed == 2 * 36 * (18 + 6 + 6 + 18)
    assert sum(p.numel() for p in model.parameters()) == before - report.total.removed - 2 * (18 + 6 + 6)


@pytest.mark.parametrize("way", ["key-value-groups", "query-heads"])
@pytest.mark.parametrize("name", MODELS)
def test_planned_is_what_is_removed(name: str, way: str) -> None:
    model, chosen = MODELS[name](), recipe(sparsity_type=way, sparsity_ratio=0.5)
    layers, notes = planned_layers(model, chosen)
    shrinks = sum(
        sparsity_type_of(chosen).shrinkage(block, chosen)
        for layer in find_decoder(model).layers
        for block in sparsity_type_of(chosen).blocks(layer, chosen)
    )
    before = sum(p.numel() for p in model.parameters())
    report = pruned(model, chosen)
    found = [{role: module.removed for role, module in layer.modules.items()} for layer in report.layers]
    assert [{role: module.removed for role, module in layer.modules.items()} for layer in layers] == found
    assert shrinks == before - sum(p.numel() for p in model.parameters())
    assert not notes


def test_a_plan_says_what_is_open() -> None:
    _, [note] = planned_layers(biased(), recipe(sparsity_type="heads", sparsity_ratio=0.34))
    assert "the run removes query-heads or key-value-groups, by their scores; planned is the first" in note


def refused(config: Any, **chosen: Any) -> str:
    model = random_model(config)
    before, stated = state(model), model.config.to_dict()
    with pytest.raises(InputError) as caught:
        pruned(model, recipe(**{"sparsity_type": "heads", **chosen}))
    assert same_state(before, state(model))
    assert model.config.to_dict() == stated
    return str(caught.value)


def test_heads_that_are_computed_together_are_refused() -> None:
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    assert "the attention of layer 0 (Olmo2DecoderLayer)" in refused(Olmo2Config(**SIZES, **heads))
    pairs = {"num_attention_heads": 6, "num_key_value_heads": 2}
    assert "the attention of layer 0 (DiffLlamaDecoderLayer)" in refused(DiffLlamaConfig(**SIZES, **pairs))


def test_a_fused_matrix_is_refused() -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=VOCAB, n_positions=64)
    assert "does not consist of q/k/v/o projections" in refused(config)


def test_a_class_whose_head_size_follows_from_the_number_is_refused() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 40, "num_attention_heads": 4}
    message = refused(OPTConfig(**sizes, vocab_size=VOCAB, word_embed_proj_dim=32, max_position_embeddings=64))
    assert "with fewer heads, `model.decoder.layers.0.self_attn." in message


def test_a_number_that_the_class_refuses_is_an_error() -> None:
    # As in Gemma 3 270M: 4 heads in one group, of which transformers loads 2 but not 3.
    config = Gemma3TextConfig(**{**SIZES, "hidden_size": 40}, num_attention_heads=4, num_key_value_heads=1, head_dim=16)
    message = refused(config, sparsity_ratio=0.25)
    assert message.startswith("Gemma3ForCausalLM cannot have 3 heads: ")
    assert "hidden size (40)" in message
    model = random_model(config)
    pruned(model, recipe(sparsity_type="heads", sparsity_ratio=0.5))
    assert model.config.num_attention_heads == 2
