"""Later passes through a layer reuse the outputs of its attention, and change nothing but the time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pruning import pruned, recipe, small, state
from tiny import Family

from neuronrank_torch.pruning import layer as pruning_layer

CHOSEN = recipe(nsamples=5, update="gradual")


def calls(model: torch.nn.Module) -> list[int]:
    """A list that grows by one at each forward pass of a layer's attention projections."""
    seen: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "granite"])
@pytest.mark.parametrize("update", ["least-squares", "gradual"])
def test_the_weights_are_those_without_reuse(family: Family, update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(nsamples=5, update=update)
    models = [small(family), small(family)]
    pruned(models[0], chosen, batch_size=2)
    monkeypatch.setattr(pruning_layer, "_attention_outputs", lambda run, plan: None)
    pruned(models[1], chosen, batch_size=2)
    expected = state(models[1])
    for name, weight in state(models[0]).items():
        assert torch.equal(weight, expected[name]), name


def test_attention_is_computed_once_a_layer_unless_it_is_pruned() -> None:
    for include_attention, passes in ((False, 2), (True, 9)):  # By two layers; the last one propagates nothing.
        model = small()
        seen = calls(model)
        pruned(model, replace(CHOSEN, include_attention=include_attention), batch_size=2)
        assert seen.count(1) == passes  # The only micro-batch of one sequence is the last of a pass.
        assert all("forward" not in vars(layer.self_attn) for layer in model.model.layers)


def test_attention_that_returns_more_is_computed_in_every_pass() -> None:
    model = small()
    model.set_attn_implementation("eager")
    weights: list[torch.Tensor] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    seen = calls(model)
    pruned(model, CHOSEN, batch_size=2)
    assert all(isinstance(returned, torch.Tensor) for returned in weights)
    assert seen.count(1) == 5
