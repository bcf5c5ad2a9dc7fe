"""What cannot be pruned is refused with the layer's name, and never half a layer is done."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from pruning import TEXT, linears, pruned, recipe, same_state, small, state, zeros
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from neuronrank_core import (
    METHODS,
    AllZeroMetricError,
    InputError,
    MissingStatisticsError,
    NeuronRankError,
    NonFiniteError,
)
from neuronrank_core.methods import requires
from neuronrank_torch.pruning.result import Calibration

CALIBRATED = [name for name in METHODS if requires(recipe(method=name))]


class UnknownMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_gated_mlps(method: str) -> None:
    model = MambaForCausalLM(MambaConfig(num_hidden_layers=2, hidden_size=16, state_size=4, vocab_size=258))
    with pytest.raises(MissingStatisticsError, match="No TF-IDF statistics for layer 0") as error:
        pruned(model, recipe(method=method))
    assert "layer.mlp.gate_proj" in error.value.hint


@pytest.mark.parametrize("method", ["magnitude", "neuronrank_tfidf"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_model_that_is_gated_in_part(method: str, layer: int) -> None:
    model = small(layers=3)
    model.model.layers[layer].mlp = UnknownMLP()
    before = state(model)
    with pytest.raises(MissingStatisticsError, match=f"No TF-IDF statistics for layer {layer}"):
        pruned(model, recipe(method=method))
    assert same_state(before, state(model))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("module", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(method: str, module: str, value: float) -> None:
    model = small()
    with torch.no_grad():
        linears(model, 1)[module].weight[3, 5] = value
    before = copy.deepcopy(model.model.layers[1])
    with pytest.raises(NonFiniteError, match="layer 1"):
        pruned(model, recipe(method=method))
    for a, b in zip(before.parameters(), model.model.layers[1].parameters(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("method", METHODS)
def test_an_up_projection_of_zeros_has_no_metric(method: str) -> None:
    # Nothing passes through any neuron: scores of up, and all that build on the product, are zero.
    model = small()
    with torch.no_grad():
        linears(model, 1)["up_proj"].weight.zero_()
    with pytest.raises(AllZeroMetricError, match=r"All-zero metric in layer 1 (gate|up)_proj") as error:
        pruned(model, recipe(method=method))
    assert "--nsamples" in error.value.hint
    assert zeros(model, 0)["up_proj"].mean() == 0.5  # layers already done stay pruned
    assert not zeros(model, 1)["down_proj"].any()


def test_a_gate_that_never_opens_has_no_metric() -> None:
    model = small()
    with torch.no_grad():
        linears(model, 0)["gate_proj"].weight.zero_()
    before = state(model)
    with pytest.raises(AllZeroMetricError, match="layer 0 gate_proj"):
        pruned(model, recipe(method="neuronrank_tfidf"))
    assert same_state(before, state(model))


def test_a_pattern_that_does_not_fit() -> None:
    model = small()
    before = state(model)
    with pytest.raises(InputError, match="layer 0 gate_proj"):
        pruned(model, recipe(sparsity_type="2:5"))
    assert same_state(before, state(model))


@pytest.mark.parametrize("method", CALIBRATED)
def test_too_little_text(method: str) -> None:
    with pytest.raises(InputError, match="31"):
        pruned(small(), recipe(method=method), "x" * 31)


def test_methods_without_calibration_do_not_look_at_the_text() -> None:
    def unread() -> Iterator[str]:
        raise AssertionError
        yield

    report = pruned(small(), recipe(method="magnitude"), unread())
    assert report.calibration == Calibration()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("text", [TEXT, "too short"])
def test_the_mode_is_what_it_was(training: bool, text: str) -> None:
    model = small().train(training)
    try:
        pruned(model, recipe(), text)
    except NeuronRankError:
        assert text != TEXT
    assert {module.training for module in model.modules()} == {training}


def test_dropout_is_off_while_calibrating() -> None:
    model, plain = small("llama"), small("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    pruned(model.train(), recipe())
    pruned(plain, recipe())
    assert same_state(state(model), state(plain))


def test_hooks_and_forwards_are_gone_afterwards() -> None:
    model = small()
    pruned(model, recipe(method="neuronrank_tfidf", input_exp=1.0))
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
    # Parameters can be trained on: nothing of a mode for inference alone stays on them.
    model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
