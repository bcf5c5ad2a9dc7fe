"""What a run promises beside the counts: which layers, which modules, repeatable, and clear errors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pruning import ATTENTION, MLP, linears, pruned, recipe, same_state, small, state, zeros
from torch import nn

from neuronrank_core import AllZeroMetricError, InputError, MissingStatisticsError, NonFiniteError

WORDY = "The quick brown fox jumps over the lazy dog. " * 50


@pytest.mark.parametrize("method", ["wanda", "neuronrank_wanda", "neuronrank_tfidf"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(method: str) -> None:
    states = []
    for seed in (0, 0, 1):
        model = small()
        pruned(model, recipe(method=method, seed=seed))
        states.append(state(model))
    assert same_state(states[0], states[1])
    assert not same_state(states[0], states[2])


@pytest.mark.parametrize("method", ["wanda", "neuronrank_wanda", "neuronrank_tfidf", "neuronrank_old"])
def test_micro_batches_change_no_more_than_near_ties(method: str) -> None:
    masks = []
    for batch_size in (1, 4):
        model = small()
        pruned(model, recipe(method=method), batch_size=batch_size)
        masks.append(np.concatenate([zeros(model, layer)[name].ravel() for layer in (0, 1) for name in MLP]))
    assert (masks[0] != masks[1]).mean() < 1e-3


def test_only_the_last_layers_are_pruned() -> None:
    dense, model = small(layers=4), small(layers=4)
    report = pruned(model, recipe(pruning_last=1))
    assert [layer.layer for layer in report.layers] == [3]
    for layer in range(3):
        for name, linear in linears(model, layer).items():
            assert torch.equal(linear.weight, linears(dense, layer)[name].weight)
    assert report.notes == ()


def test_more_layers_than_there_are_prunes_all_and_says_so() -> None:
    report = pruned(small(), recipe(pruning_last=30))
    assert len(report.layers) == 2
    assert "30" in report.notes[0]
    assert "2 layers" in report.notes[0]


def test_attention_only_where_asked_for() -> None:
    model, dense = small(), small()
    pruned(model, recipe())
    for name in ATTENTION:
        assert torch.equal(linears(model, 0)[name].weight, linears(dense, 0)[name].weight)
    pruned(model, recipe(include_attention=True))
    assert all((linears(model, 0)[name].weight == 0).float().mean() == 0.5 for name in ATTENTION)


def test_untied_head() -> None:
    model = small(tied=False)
    embeddings = model.get_input_embeddings().weight.clone()
    report = pruned(model, recipe(prune_lm_head=True))
    assert report.layers[-1].layer == "lm_head"
    assert int((model.lm_head.weight == 0).sum()) == model.lm_head.weight.numel() // 2
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_tied_head_is_refused_before_anything_happens(method: str) -> None:
    model = small(tied=True)
    before = state(model)
    with pytest.raises(InputError, match="tied to the embeddings"):
        pruned(model, recipe(prune_lm_head=True, method=method))
    assert same_state(before, state(model))


class Block(nn.Module):
    """A decoder layer of no known class; its MLP may lack a projection."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.mlp = nn.Module()
        for name in MLP if gated else ("gate_up_proj", "down_proj"):
            setattr(self.mlp, name, nn.Linear(4, 4))


@pytest.mark.parametrize(("gated", "layer"), [([True, False], 1), ([False, True], 0), ([False], 0)])
def test_layers_without_a_gated_mlp_are_named(gated: list[bool], layer: int) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(Block(g) for g in gated)
    with pytest.raises(MissingStatisticsError, match=f"No TF-IDF statistics for layer {layer}") as caught:
        pruned(model, recipe())
    assert "layer.mlp.gate_proj" in caught.value.hint


def test_a_decoder_deep_inside_another_model_is_found() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.vision, self.language = nn.Linear(3, 3), inner

    model = Wrapper(small())
    assert pruned(model, recipe()).zeros > 0


@pytest.mark.parametrize("method", ["wanda", "neuronrank_wanda", "neuronrank_tfidf", "magnitude"])
def test_nan_in_a_weight_is_an_error_that_names_the_layer(method: str) -> None:
    model = small()
    with torch.no_grad():
        linears(model, 1)["gate_proj"].weight[3, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1"):
        pruned(model, recipe(method=method))


def test_neurons_that_never_fire_are_an_all_zero_metric() -> None:
    model = small()
    with torch.no_grad():
        linears(model, 1)["up_proj"].weight.zero_()
    with pytest.raises(AllZeroMetricError, match="layer 1") as caught:
        pruned(model, recipe(method="neuronrank_tfidf", signal="product"))
    assert "--nsamples" in caught.value.hint
    assert "--nr-q-active" in caught.value.hint


def test_too_short_a_text_says_how_much_is_needed() -> None:
    with pytest.raises(InputError, match="32"):
        pruned(small(), recipe(), text="short")


def test_texts_may_be_a_list() -> None:
    one, other = small(), small()
    pruned(one, recipe(), text=[WORDY, WORDY])
    pruned(other, recipe(), text=WORDY + "\n\n" + WORDY)
    assert same_state(state(one), state(other))


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_as_before(training: bool) -> None:
    model = small().train(training)
    pruned(model, recipe())
    assert model.training is training


@pytest.mark.parametrize(
    "change",
    [
        {"idf_exp": 3.0},
        {"tf_exp": 0.25},
        {"weight_exp": 0.5},
        {"input_exp": 1.0},
        {"spikiness_exp": 1.0},
        {"tfidf_mode": "topic"},
        {"tfidf_mode": "token"},
        {"q_active": 0.8},
        {"signal": "product"},
        {"tfidf_mode": "topic", "tfidf_k": 3},
    ],
    ids=str,
)
def test_every_setting_of_the_seed_formula_changes_the_mask(change: dict[str, object]) -> None:
    base = {"tfidf_mode": "topic"} if "tfidf_k" in change else {}
    masks = []
    for chosen in (base, change):
        model = small(layers=1)
        pruned(model, recipe(method="neuronrank_tfidf", **chosen))
        masks.append(zeros(model, 0))
    assert any((masks[0][name] != masks[1][name]).any() for name in MLP)


def test_a_copy_is_left_alone() -> None:
    model = small()
    twin = copy.deepcopy(model)
    pruned(model, recipe())
    assert same_state(state(twin), state(small()))
