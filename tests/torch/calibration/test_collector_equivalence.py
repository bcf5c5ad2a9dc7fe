"""The collector's table is the one that the core makes of the same activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gated import EVERYTHING, GatedMLP, assert_agrees, collect, collector, documents

from neuronrank_core import Recipe, merge
from neuronrank_core.recipe import SIGNALS

#: Some shorter than the tokens sampled of each, some as long, some longer.
RAGGED = (1, 5, 8, 13, 21)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("threshold", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_signal(signal: str, threshold: float, dtype: torch.dtype) -> None:
    mlp = GatedMLP().to(dtype)
    recipe = Recipe(**EVERYTHING, signal=signal, threshold=threshold, tokens_per_document=8)
    ours, rows = collect(mlp, [x.to(dtype) for x in documents(RAGGED)], recipe, reference=True)
    assert_agrees(ours, merge(rows))


@pytest.mark.parametrize("kept", [1, 2, 7, 64])
def test_sampled_tokens_are_those_of_the_core(kept: int) -> None:
    recipe = Recipe(**EVERYTHING, tokens_per_document=kept)
    ours, rows = collect(GatedMLP(), documents(RAGGED), recipe, reference=True)
    assert np.array_equal(ours.sample, merge(rows).sample)
    assert ours.sample_tokens.tolist() == [min(n, kept) for n in RAGGED]
    assert ours.tokens.tolist() == list(RAGGED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_float32_whatever_the_model(dtype: torch.dtype) -> None:
    # 3000 tokens of about 1: a sum in half precision would stop growing at a few hundred.
    recipe = Recipe(**EVERYTHING)
    ours, rows = collect(GatedMLP().to(dtype), [x.to(dtype) for x in documents([3000])], recipe, reference=True)
    assert_agrees(ours, merge(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_threshold_is_not_rounded_to_the_gate_s_precision(dtype: torch.dtype) -> None:
    mlp = GatedMLP(features=2, neurons=2).to(dtype)
    mlp.gate_proj.weight.data = torch.eye(2, dtype=dtype)
    # 0.1 is no bfloat16: the nearest one above it is an open gate.
    x = torch.tensor([[0.10009765625, 0.099]] * 4, dtype=dtype)
    ours, rows = collect(mlp, [x], Recipe(**EVERYTHING, threshold=0.1), reference=True)
    assert ours.open_gate.tolist() == merge(rows).open_gate.tolist() == [[4, 0]]


@pytest.mark.parametrize(("threshold", "opened"), [(0.0, 2), (0.5, 1), (-0.5, 5)])
def test_a_gate_at_the_threshold_is_closed(threshold: float, opened: int) -> None:
    mlp = GatedMLP(features=1, neurons=1)
    mlp.gate_proj.weight.data = torch.ones(1, 1)
    x = torch.tensor([[-0.5], [0.0], [-0.25], [0.0], [0.5], [1.0]])
    ours, rows = collect(mlp, [x], Recipe(**EVERYTHING, threshold=threshold), reference=True)
    assert ours.open_gate.tolist() == merge(rows).open_gate.tolist() == [[opened]]


def test_activations_are_left_alone() -> None:
    mlp, x = GatedMLP(), torch.stack(documents([9, 9]))
    with torch.no_grad():
        expected = mlp(x)
        for signal in SIGNALS:
            with collector(mlp, Recipe(**EVERYTHING, signal=signal)) as c:
                assert torch.equal(mlp(x), expected)
                c.add_documents(0, 9)
