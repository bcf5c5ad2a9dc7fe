"""``--update-target model``: the outputs of each MLP make up for what the hidden states have lost before it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from pruning import TEXT, pruned, recipe, same_state, small, state
from tiny import tiny_tokenizer
from torch import Tensor, nn

from neuronrank_core import InputError
from neuronrank_core.update.least_squares import least_squares_update
from neuronrank_torch.text.sequences import calibration_sequences

CHOSEN: dict[str, Any] = {"nsamples": 32, "update": "least-squares", "update_target": "model"}


@torch.no_grad()
def seen(model: nn.Module, layer: int) -> dict[str, Tensor]:
    """What a plain forward pass over the calibration text shows of a layer, in float64, one row for each token."""
    found: dict[str, Tensor] = {}
    own = model.model.layers[layer]
    hooks = [
        own.register_forward_hook(lambda _, args, out: found.update(out=out)),
        own.mlp.register_forward_hook(lambda _, args, out: found.update(mlp=out)),
        own.mlp.down_proj.register_forward_pre_hook(lambda _, args: found.update(x=args[0])),
    ]
    model.model(calibration_sequences(tiny_tokenizer(), recipe(**CHOSEN), TEXT), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: tensor.flatten(0, 1).double() for name, tensor in found.items()}


def before_factor_or_norm(model: nn.Module, layer: int, lost: Tensor, output: Tensor) -> Tensor:
    """What an MLP's output has to change by, so that the layer's changes by ``lost``; from the family's formula.

    ``output`` is the MLP's, by whose size a norm divides.
    """
    norm = getattr(model.model.layers[layer], "post_feedforward_layernorm", None)
    if norm is None:
        return lost / getattr(model.config, "residual_multiplier", 1.0)
    gain = 1 + norm.weight.detach().double()
    bounded = gain.square().clamp(min=0.1 * float(np.median(gain.square())))
    return lost * output.square().mean(1, keepdim=True).sqrt() * gain / bounded


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(("family", "close"), [("llama", 1e-3), ("granite", 1e-3), ("gemma3", 0.1)])
def test_down_is_fitted_to_what_brings_the_dense_hidden_states_back(family: Any, close: float, layer: int) -> None:
    dense = small(family, layers=3)
    model = copy.deepcopy(dense)
    pruned(model, recipe(**CHOSEN), batch_size=3)
    own, was = (one.model.layers[layer].mlp.down_proj for one in (model, dense))
    x, mask = seen(model, layer)["x"].numpy(), (own.weight == 0).numpy()
    weight, fitted = was.weight.detach().double().numpy(), own.weight.detach().double().numpy()
    if was.bias is not None:
        x, weight = np.hstack([x, np.ones((len(x), 1))]), np.column_stack([weight, was.bias.detach().double().numpy()])
        fitted = np.column_stack([fitted, own.bias.detach().double().numpy()])
    model.model.layers[layer].load_state_dict(dense.model.layers[layer].state_dict())
    here, there = seen(model, layer), seen(dense, layer)
    lost = before_factor_or_norm(dense, layer, there["out"] - here["out"], there["mlp"])
    goals = (here["mlp"], here["mlp"] + lost)
    without, expected = (
        least_squares_update(weight, mask, x.T @ x, np.linalg.inv, target=goal.numpy().T @ x) for goal in goals
    )
    assert np.linalg.norm(fitted - expected) <= close * np.linalg.norm(expected)
    if layer:  # Nothing is lost before the first.
        assert np.linalg.norm(fitted - expected) < 0.2 * np.linalg.norm(without - expected)


@pytest.mark.parametrize("update", ["least-squares", "gradual"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "granite"])
def test_the_hidden_states_come_closer_to_those_of_the_dense_model(family: Any, update: str) -> None:
    dense, errors = small(family, layers=4), {}
    for target in ("layer", "model"):
        model = copy.deepcopy(dense)
        pruned(model, recipe(**CHOSEN | {"update": update, "update_target": target}))
        errors[target] = float((seen(model, 3)["out"] - seen(dense, 3)["out"]).norm())
    assert errors["model"] < 0.95 * errors["layer"], errors


def test_layers_before_the_first_pruned_one_count_too() -> None:
    dense = small("llama", layers=4)
    models = [copy.deepcopy(dense) for _ in range(2)]
    for model, target in zip(models, ("layer", "model"), strict=True):
        pruned(model, recipe(**CHOSEN | {"update_target": target}, pruning_last=1))
    assert same_state(state(models[0]), state(models[1]))  # Nothing is lost before the only pruned layer.


def test_a_mixture_is_refused_and_left_as_it_was() -> None:
    model = small("qwen3_moe", layers=2)
    before = state(model)
    with pytest.raises(InputError, match=r"^--update-target model .*a mixture of experts"):
        pruned(model, recipe(**CHOSEN))
    assert same_state(before, state(model))


def test_what_mixes_the_features_behind_an_mlp_is_refused() -> None:
    model = small("gemma3", layers=2)
    model.model.layers[0].post_feedforward_layernorm = nn.Linear(32, 32)
    with pytest.raises(InputError, match=r"^--update-target model .*layer 0 does something else with it"):
        pruned(model, recipe(**CHOSEN))


@pytest.mark.parametrize(
    ("chosen", "field"),
    [({"propagate": "dense"}, "propagate"), ({"sparsity_type": "neurons"}, "update_target")],
)
def test_what_cannot_be_asked(chosen: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field} is "):
        recipe(**CHOSEN | chosen)


@pytest.mark.parametrize("update", ["least-squares", "gradual"])
@pytest.mark.parametrize("last", [None, 2])
def test_progress_adds_up(last: int | None, update: str) -> None:
    heard: list[tuple[int, int]] = []
    chosen = recipe(**CHOSEN | {"update": update}, pruning_last=last)

    pruned(
        small("llama", layers=3),
        chosen,
        batch_size=5,
        progress=lambda stage, done, total, unit: heard.append((done, total)),
    )
    assert heard == [(done, len(heard)) for done in range(1, len(heard) + 1)]
