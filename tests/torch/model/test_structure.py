"""Decoders are found by their structure, whatever their classes are called and however they are wrapped."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from pruning import MLP, pruned, recipe, small, zeros
from torch import nn
from torch.nn.functional import silu
from transformers import GraniteMoeSharedConfig, Lfm2Config, ModernBertDecoderConfig, MoshiConfig, Phi3Config
from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedMLP
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP
from transformers.models.modernbert_decoder.modeling_modernbert_decoder import ModernBertDecoderMLP
from transformers.models.moshi.modeling_moshi import MoshiGatingMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from neuronrank_core import InputError, MissingStatisticsError
from neuronrank_core.errors import UnsupportedModelError
from neuronrank_torch.model.early_stop import captured
from neuronrank_torch.model.families import LAYOUTS
from neuronrank_torch.model.structure import find_decoder, resolve_layer, untied_head


def renamed(module: nn.Module, name: str) -> None:
    module.__class__ = type(name, (type(module),), {})


class Wrapper(nn.Module):
    """A language model inside something larger, as in models that also see."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.vision_tower = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)])}))
        self.model = nn.Module()
        self.model.language_model = language_model

    def forward(self, **tokens: object) -> object:
        return self.model.language_model(**tokens)


class Experts(nn.Module):
    def __init__(self, *mlps: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlps)


@pytest.mark.parametrize(
    "module",
    [
        Lfm2MLP(Lfm2Config(hidden_size=32, intermediate_size=64)),
        GraniteMoeSharedMLP(GraniteMoeSharedConfig(hidden_size=32, shared_intermediate_size=48)),
        Phi3MLP(Phi3Config(hidden_size=32, intermediate_size=64, pad_token_id=None)),
        MoshiGatingMLP(MoshiConfig(hidden_size=32, ffn_dim=128)),
        ModernBertDecoderMLP(
            ModernBertDecoderConfig(hidden_size=32, intermediate_size=64, hidden_activation="silu")
        ).eval(),
    ],
    ids=lambda module: type(module).__name__,
)
@torch.no_grad()
def test_gate_and_up_are_those_of_the_forward(module: nn.Module) -> None:
    [mlp] = [found for layout in LAYOUTS.values() if (found := layout.find(module, 0))]
    x, weight = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)), mlp.weights
    product = captured(mlp.projections["down_proj"].on_input, partial(module, x))
    torch.testing.assert_close(product, silu(x @ weight["gate_proj"].T) * (x @ weight["up_proj"].T))


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
    assert find_decoder(model).layers[0].mlp.module is model.model.layers[0].feed_forward


def test_a_nested_decoder_is_found_and_pruned() -> None:
    inner = small(tied=False)
    wrapper = Wrapper(inner)
    assert find_decoder(wrapper).body is inner.model
    assert [layer.module for layer in find_decoder(wrapper).layers] == list(inner.model.layers)
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
    with pytest.raises(MissingStatisticsError, match="is not supported: it has no decoder layers with MLPs"):
        find_decoder(both)


@pytest.mark.parametrize("first", [True, False])
def test_a_second_stack_of_layers_is_refused_by_name(first: bool) -> None:
    model, draft = small(), small(seed=1)
    parts = {"draft": draft, "main": model} if first else {"main": model, "draft": draft}
    both = nn.ModuleDict(parts)
    both.get_input_embeddings = model.get_input_embeddings
    with pytest.raises(UnsupportedModelError, match=r"another stack of layers .* stay dense: draft\.model$") as error:
        find_decoder(both)
    assert "not supported" in error.value.hint


def test_a_model_that_does_not_know_its_embeddings_is_searched_whole() -> None:
    model = small()

    def unknown() -> None:
        raise NotImplementedError

    model.get_input_embeddings = unknown
    assert find_decoder(model).body is model.model


def test_linears_come_by_short_name() -> None:
    module = small().model.layers[0]
    layer = resolve_layer(module, 0)
    assert list(layer.mlp.projections) == list(MLP)
    [mlp, attention] = layer.blocks(include_attention=True)
    assert mlp is layer.mlp
    assert list(attention.projections) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert mlp.projections["up_proj"].module is module.mlp.up_proj
    assert attention.projections["o_proj"].module is module.self_attn.o_proj


def test_what_is_written_to_a_projection_is_in_the_model() -> None:
    module = small("mixtral").model.layers[0]
    experts = module.mlp.experts
    for block in resolve_layer(module, 0).blocks(include_attention=True):
        for projection in block.projections.values():
            projection.weight.fill_(7.0)
    assert (experts.gate_up_proj == 7).all()
    assert (experts.down_proj == 7).all()
    assert (module.self_attn.k_proj.weight == 7).all()


def test_a_copy_is_not_reached_by_later_changes() -> None:
    mlp = resolve_layer(small().model.layers[0], 0).mlp
    x, before = torch.randn(2, 3, 32), {role: weight.clone() for role, weight in mlp.weights.items()}
    copied = mlp.copied({})
    with torch.no_grad():
        output = mlp.module.up_proj(x)
        for weight in mlp.weights.values():
            weight.zero_()
        assert torch.equal(copied.producers[1](x), output)
        assert not mlp.producers[1](x).any()
    assert all(torch.equal(copied.weights[role], weight) for role, weight in before.items())


def test_a_layer_without_an_mlp_is_named() -> None:
    model = small(layers=3)
    layer = model.model.layers[2]
    del layer.mlp
    layer.mixer = nn.Sequential(nn.Linear(32, 64))
    assert [len(found.mlps) for found in find_decoder(model).layers] == [1, 1, 0]
    renamed(layer.mixer, "OtherMLP")
    with pytest.raises(MissingStatisticsError, match="layer 2: LlamaDecoderLayer has no MLP in a known layout"):
        find_decoder(model)


def test_a_layer_without_any_mlp_says_so() -> None:
    model = small(layers=3)
    model.model.layers[2].mlp = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layer 2 \(LlamaDecoderLayer\) has no MLP"):
        find_decoder(model).layers[2].mlp  # noqa: B018 (raises)


def test_experts_are_refused() -> None:
    # Tokens of a document go different ways: what one expert sees is no document.
    model, other = small(), small(seed=1)
    for layer, twin in zip(model.model.layers, other.model.layers, strict=True):
        layer.mlp = Experts(layer.mlp, twin.mlp)
    with pytest.raises(InputError, match=r"layer 0 .* has 2 MLPs") as error:
        find_decoder(model)
    assert "experts" in error.value.hint


def test_attention_without_four_projections_is_refused() -> None:
    layer = small().model.layers[1]
    del layer.self_attn.q_proj
    layer.self_attn.qkv_proj = nn.Linear(32, 64)
    resolved = resolve_layer(layer, 1)
    assert resolved.blocks() == (resolved.mlp,)
    with pytest.raises(InputError, match=r"layer 1 .* has no q/k/v/o projections"):
        resolved.blocks(include_attention=True)


def test_two_attentions_in_a_layer_are_refused() -> None:
    layer = small().model.layers[1]
    layer.cross_attention = copy.deepcopy(layer.self_attn)
    with pytest.raises(InputError, match=r"layer 1 .* has no q/k/v/o projections"):
        resolve_layer(layer, 1).blocks(include_attention=True)


def test_heads() -> None:
    untied = small(tied=False)
    assert untied_head(untied).module is untied.lm_head
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
        find_decoder(model).layers[1].mlp.activation  # noqa: B018 (raises)
