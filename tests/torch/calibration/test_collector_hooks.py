"""Hooks go when the collector does, and a number that is none stops the run."""

from __future__ import annotations

import pytest
import torch
from gated import EVERYTHING, GatedMLP, collect, collector, documents

from neuronrank_core import NonFiniteError, Recipe


def test_hooks_are_there_inside_alone() -> None:
    mlp = GatedMLP()
    with collector(mlp, Recipe(**EVERYTHING)):
        assert mlp.hooks() > 0
    assert mlp.hooks() == 0


def test_hooks_go_after_an_exception_too() -> None:
    mlp = GatedMLP()
    with pytest.raises(KeyboardInterrupt), collector(mlp, Recipe(**EVERYTHING)):
        raise KeyboardInterrupt
    assert mlp.hooks() == 0


def test_the_user_s_own_hooks_stay() -> None:
    mlp, calls = GatedMLP(), []
    mlp.gate_proj.register_forward_hook(lambda module, args, output: calls.append(1))
    collect(mlp, documents([3, 3]), Recipe(**EVERYTHING))
    assert mlp.hooks() == 1
    assert len(calls) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "wanda"},
        {"method": "neuronrank_old"},
        {"method": "neuronrank_tfidf"},
        # The sample alone, which does not hold the token that is wrong.
        {"method": "neuronrank_tfidf", "tf_exp": 0.0},
        {"method": "neuronrank_tfidf", "tf_exp": 0.0, "signal": "activated"},
        {"method": "neuronrank_tfidf", "tf_exp": 0.0, "signal": "product"},
    ],
)
def test_nan_and_inf_name_the_layer(chosen: dict, value: float) -> None:
    texts = documents([5, 5])
    texts[1][3] = value
    mlp = GatedMLP()
    with pytest.raises(NonFiniteError, match="of layer 7") as error:
        collect(mlp, texts, Recipe(**chosen, tokens_per_document=1), batch_size=2)
    assert "float32" in error.value.hint
    assert mlp.hooks() == 0


def test_half_precision_that_overflows_is_an_error() -> None:
    mlp = GatedMLP().half()
    mlp.gate_proj.weight.data.fill_(6e4)
    with pytest.raises(NonFiniteError, match="of layer 7"):
        collect(mlp, [torch.full((3, 6), 6.0, dtype=torch.float16)], Recipe(**EVERYTHING))
