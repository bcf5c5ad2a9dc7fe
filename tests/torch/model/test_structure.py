"""Decoders are found by their structure, whatever their classes are called and however they are wrapped."""

from __future__ import annotations

import pytest
import torch
from pruning import MLP, pruned, recipe, small, zeros
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

from neuronrank_core import InputError, MissingStatisticsError
from neuronrank_torch.model.structure import activation_of, find_decoder, gated_mlp, prunable_linears, untied_head


def renamed(module: nn.Module, name: str) -> None:
    module.__class__ = type(name, (type(module),), {})


class Wrapper(nn.Module):
    """A language model inside something larger, as in models that also see."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.vision_tower = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)])}))
        self.model = nn.Module()
        self.model.language_model = language_model


class Experts(nn.Module):
    def __init__(self, *mlps: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlps)


def test_classes_may_have_any_name() -> None:
    model = small()
    for module in (model, model.model, *model.model.layers, *(layer.mlp for layer in model.model.layers)):
        renamed(module, "Nobody")
    assert find_decoder(model).body is model.model
    pruned(model, recipe())
    assert all(zeros(model, 1)[name].mean() == 0.5 for name in MLP)


def test_the_mlp_may_have_any_place_in_the_layer() -> None:
    model = small()
    for layer in model.model.layers:
        layer.feed_forward = layer.mlp
        del layer.mlp
    assert gated_mlp(model.model.layers[0], 0) is model.model.layers[0].feed_forward


def test_a_nested_decoder_is_found_and_pruned() -> None:
    inner = small(tied=False)
    wrapper = Wrapper(inner)
    assert find_decoder(wrapper).body is inner.model
    assert find_decoder(wrapper).layers == list(inner.model.layers)
    pruned(wrapper, recipe())
    assert all(zeros(inner, 1)[name].mean() == 0.5 for name in MLP)


@pytest.mark.parametrize("first", [True, False])
def test_gated_layers_that_see_no_tokens_are_passed_over(first: bool) -> None:
    model, other = small(), small(seed=1)
    tower = nn.ModuleDict({"layers": other.model.layers})
    parts = {"tower": tower, "model": model} if first else {"model": model, "tower": tower}
    both = nn.ModuleDict(parts)
    both.get_input_embeddings = model.get_input_embeddings
    assert find_decoder(both).body is model.model
    both.get_input_embeddings = nn.Module
    with pytest.raises(MissingStatisticsError, match="no decoder layers with a gated MLP"):
        find_decoder(both)


def test_linears_come_by_short_name() -> None:
    layer = small().model.layers[0]
    assert list(prunable_linears(layer, 0)) == list(MLP)
    found = prunable_linears(layer, 0, include_attention=True)
    assert list(found) == [*MLP, "q_proj", "k_proj", "v_proj", "o_proj"]
    assert found["up_proj"] is layer.mlp.up_proj
    assert found["o_proj"] is layer.self_attn.o_proj


def test_fused_gate_and_up_are_refused() -> None:
    model = Phi3ForCausalLM(
        Phi3Config(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=258,
            pad_token_id=None,
        )
    )
    with pytest.raises(MissingStatisticsError, match="Phi3ForCausalLM has no decoder layers with a gated MLP"):
        find_decoder(model)


def test_a_layer_without_a_gated_mlp_is_named() -> None:
    model = small(layers=3)
    model.model.layers[2].mlp = nn.Identity()
    with pytest.raises(MissingStatisticsError, match="layer 2: LlamaDecoderLayer has no gated MLP"):
        find_decoder(model)


def test_experts_are_refused() -> None:
    # Tokens of a document go different ways: what one expert sees is no document.
    model, other = small(), small(seed=1)
    for layer, twin in zip(model.model.layers, other.model.layers, strict=True):
        layer.mlp = Experts(layer.mlp, twin.mlp)
    with pytest.raises(InputError, match=r"layer 0 .* has 2 gated MLPs") as error:
        find_decoder(model)
    assert "experts" in error.value.hint


def test_attention_without_four_projections_is_refused() -> None:
    layer = small().model.layers[1]
    del layer.self_attn.q_proj
    layer.self_attn.qkv_proj = nn.Linear(32, 64)
    assert list(prunable_linears(layer, 1)) == list(MLP)
    with pytest.raises(InputError, match=r"layer 1 .* has no q/k/v/o projections"):
        prunable_linears(layer, 1, include_attention=True)


def test_heads() -> None:
    untied = small(tied=False)
    assert untied_head(untied) is untied.lm_head
    with pytest.raises(InputError, match="tied"):
        untied_head(small(tied=True))
    with pytest.raises(InputError, match="LlamaModel has no lm_head"):
        untied_head(small().model)


def test_a_plain_module_has_no_decoder() -> None:
    with pytest.raises(MissingStatisticsError, match="No TF-IDF statistics for layer 0"):
        find_decoder(nn.Sequential(nn.Linear(2, 2)))
    assert torch.is_grad_enabled()


def test_an_activation_under_another_name_is_a_clear_error() -> None:
    model = small()
    del model.model.layers[1].mlp.act_fn
    with pytest.raises(InputError, match=r"layer 1.*act_fn"):
        activation_of(model.model.layers[1], 1)
