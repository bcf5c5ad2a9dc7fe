"""The re-fit's target is what the dense MLP computes, with its biases, multipliers and inner norms."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from pruning import TEXT, fit_down_to_its_own_outputs, pruned, recipe, small
from tiny import Family, tiny_tokenizer
from torch import Tensor, nn

from neuronrank_torch.text.sequences import calibration_sequences

CHOSEN = recipe(nsamples=32, method="wanda")


@torch.no_grad()
def mlp_error(dense: nn.Module, model: nn.Module) -> float:
    """Relative error of the first MLP's output on the input that the pruned model gives it, on calibration text."""
    inputs: list[Tensor] = []
    mlp = model.model.layers[0].mlp
    hook = mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(calibration_sequences(tiny_tokenizer(), CHOSEN, TEXT), use_cache=False)
    hook.remove()
    expected = dense.model.layers[0].mlp(inputs[0])
    return float((mlp(inputs[0]) - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["llama", "granite", "bitnet"])
def test_re_fitting_reduces_the_error_of_the_mlp(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = small(family, layers=1)
    errors = {}
    for update in ("none", "least-squares", "gradual", "blind"):
        model = copy.deepcopy(dense)
        if update == "blind":  # down_proj is fitted without what the dense MLP computes.
            fit_down_to_its_own_outputs(monkeypatch)
        pruned(model, replace(CHOSEN, update="gradual" if update == "blind" else update))
        errors[update] = mlp_error(dense, model)
    assert errors["least-squares"] < 0.9 * errors["none"], errors
    assert errors["gradual"] < 0.95 * errors["least-squares"], errors
    assert errors["gradual"] < 0.95 * errors["blind"], errors
