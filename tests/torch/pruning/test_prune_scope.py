"""Which modules of which layers are pruned, and what is left alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from plain import plain
from pruning import ATTENTION, TEXT, disagreements, pruned, recipe, same_state, small, state, zeros
from tiny import tiny_tokenizer
from tiny_types import tiny_type
from torch import nn

from neuronrank_core import METHODS, InputError, InvalidValueError
from neuronrank_torch.text.sequences import calibration_sequences


def pruned_layers(model: nn.Module) -> list[int]:
    return [i for i in range(len(model.model.layers)) if any(mask.any() for mask in zeros(model, i).values())]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "neuronrank_wanda"])
@pytest.mark.parametrize(("last", "expected"), [(1, [3]), (2, [2, 3]), (4, [0, 1, 2, 3])])
def test_only_the_last_layers(method: str, last: int, expected: list[int]) -> None:
    model = small(layers=4)
    report = pruned(model, recipe(method=method, pruning_last=last))
    assert pruned_layers(model) == expected == [layer.layer for layer in report.layers]
    assert report.notes == ()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_more_layers_than_there_are_is_noted(method: str) -> None:
    model = small()
    report = pruned(model, recipe(method=method, pruning_last=9))
    assert pruned_layers(model) == [0, 1]
    assert len(report.notes) == 1
    assert "9" in report.notes[0]
    assert "2 layers" in report.notes[0]


def test_embeddings_in_an_mlp_are_noted() -> None:
    """Doge keeps its routed experts in them."""
    report = pruned(tiny_type("doge+experts"), recipe(method="wanda"), batch_size=1)
    assert report.notes == ("embeddings in an MLP are not pruned: down_embed, up_embed",)
    assert pruned(tiny_type("doge"), recipe(method="wanda")).notes == ()


@pytest.mark.parametrize("method", ["magnitude", "neuronrank_wanda"])
def test_attention_only_when_asked(method: str) -> None:
    model = small()
    pruned(model, recipe(method=method))
    assert not any(mask.any() for mask in zeros(model, 0, ATTENTION).values())
    pruned(model, recipe(method=method, include_attention=True))
    assert all(mask.mean() == 0.5 for mask in zeros(model, 0, ATTENTION).values())


def head_input_norm(model: nn.Module, tokens: torch.Tensor) -> np.ndarray:
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return seen[0].square().mean((0, 1)).sqrt().numpy()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_an_untied_head(method: str, propagate: str) -> None:
    model, asked = small(tied=False), recipe(method=method, prune_lm_head=True, propagate=propagate)
    dense = copy.deepcopy(model)
    report = pruned(model, asked)
    mask = (model.lm_head.weight == 0).numpy()
    magnitude = dense.lm_head.weight.detach().double().abs().numpy()
    # What enters the head is what the model, pruned or not, hands it.
    source = model if propagate == "pruned" else dense
    norm = 1 if method == "magnitude" else head_input_norm(source, calibration_sequences(tiny_tokenizer(), asked, TEXT))
    assert disagreements(mask, magnitude * norm, "lm_head", asked) == 0
    assert report.layers[-1].layer == "lm_head"
    assert report.layers[-1].sum("zeros") == mask.sum() == mask.size // 2
    assert not (model.model.embed_tokens.weight == 0).any()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_tied_head_is_refused_before_anything_is_done(method: str) -> None:
    model = small(tied=True)
    before = state(model)
    with pytest.raises(InputError, match="tied to the embeddings") as error:
        pruned(model, recipe(method=method, prune_lm_head=True))
    assert "--nr-prune-lm-head" in error.value.hint
    assert same_state(before, state(model))


def test_a_head_takes_part_in_last_layers_too() -> None:
    model = small(layers=3, tied=False)
    report = pruned(model, recipe(method="wanda", pruning_last=1, prune_lm_head=True))
    assert [layer.layer for layer in report.layers] == [2, "lm_head"]
    assert pruned_layers(model) == [2]


def test_weights_that_are_zero_already_count() -> None:
    model = small()
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        layer.gate_proj.weight[torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) < 0.3] = 0
        layer.up_proj.weight[torch.rand(64, 32, generator=torch.Generator().manual_seed(1)) < 0.8] = 0
    before = zeros(model, 0)
    pruned(model, recipe(method="neuronrank_tfidf"))
    after = zeros(model, 0)
    assert after["gate_proj"].sum() == 64 * 32 // 2
    assert after["gate_proj"][before["gate_proj"]].all()
    # More than asked for: nothing goes, nothing comes back.
    assert np.array_equal(after["up_proj"], before["up_proj"])


@pytest.mark.parametrize("method", METHODS)
def test_pruning_twice_is_pruning_once(method: str) -> None:
    model, asked = small(), recipe(method=method)
    pruned(model, asked)
    once = state(model)
    pruned(model, asked)
    assert same_state(once, state(model))


def test_a_submodule_frozen_in_eval_mode_stays_there() -> None:
    model = small().train()
    model.model.layers[0].eval()
    pruned(model, recipe())
    assert model.training
    assert not any(module.training for module in model.model.layers[0].modules())


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size: int) -> None:
    with pytest.raises(InvalidValueError, match="batch_size"):
        pruned(small(), recipe(), batch_size=batch_size)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "opt", "phi", "bert"])
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_the_head_of_a_model_that_names_its_last_norm_otherwise(family: str, propagate: str) -> None:
    model, asked = plain(family), recipe(method="wanda", prune_lm_head=True, propagate=propagate)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(5)))
    dense = copy.deepcopy(model)
    report = pruned(model, asked)
    tokens = calibration_sequences(tiny_tokenizer(), asked, TEXT)
    norm = head_input_norm(model if propagate == "pruned" else dense, tokens)
    magnitude = dense.get_output_embeddings().weight.detach().double().abs().numpy()
    assert disagreements((head.weight == 0).numpy(), magnitude * norm, "lm_head", asked) == 0
    assert report.layers[-1].layer == "lm_head"
