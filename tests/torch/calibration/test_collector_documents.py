"""A document is one row, whatever the micro-batches; only columns that the recipe asks for are there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gated import EVERYTHING, GatedMLP, assert_agrees, collect, collector, documents
from torch import nn

from neuronrank_core import Recipe, merge
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.model.structure import resolve_layer

MOMENTS = {"signal_mean", "signal_mean_square", "signal_max", "open_gate"}
SAMPLED = {"sample", "sample_tokens"}
INPUTS = {"input_mean_square.gate_proj", "input_mean_square.down_proj"}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_micro_batches_change_nothing(batch_size: int) -> None:
    texts, recipe = documents([11] * 7), Recipe(**EVERYTHING, tokens_per_document=4)
    _, rows = collect(GatedMLP(), texts, recipe, reference=True)
    ours, _ = collect(GatedMLP(), texts, recipe, batch_size)
    assert ours.document.tolist() == list(range(7))
    assert ours.tokens.tolist() == [11] * 7
    assert_agrees(ours, merge(rows))


def test_a_document_that_passes_twice_is_counted_once() -> None:
    mlp, x = GatedMLP(), torch.stack(documents([5, 5]))
    with torch.no_grad(), collector(mlp, Recipe(**EVERYTHING)) as c:
        mlp(x + 1)
        mlp(x)
        c.add_documents(0, 5)
    once, _ = collect(mlp, list(x), Recipe(**EVERYTHING), batch_size=2)
    [table] = c.statistics()
    assert table.tokens.tolist() == [5, 5]
    assert np.array_equal(table.signal_mean, once.signal_mean)
    assert np.array_equal(table.open_gate, once.open_gate)


def test_documents_keep_the_numbers_they_are_given() -> None:
    mlp, texts = GatedMLP(), documents([5, 5, 3])
    with torch.no_grad(), collector(mlp, Recipe(**EVERYTHING)) as c:
        mlp(texts[2][None])
        c.add_documents(9, 3)
        mlp(torch.stack(texts[:2]))
        c.add_documents(2, 5)
    [table] = c.statistics()
    assert table.document.tolist() == [2, 3, 9]
    assert table.tokens.tolist() == [5, 5, 3]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"method": "wanda"}, INPUTS),
        ({"method": "neuronrank_wanda"}, INPUTS),
        ({"method": "neuronrank_wanda", "idf_exp": 1.0}, INPUTS | SAMPLED),
        ({"method": "neuronrank_unstructured"}, MOMENTS),
        ({"method": "neuronrank_old"}, MOMENTS),
        ({"method": "neuronrank_tfidf"}, MOMENTS | SAMPLED),
        ({"method": "neuronrank_tfidf", "idf_exp": 0.0}, MOMENTS),
        ({"method": "neuronrank_tfidf", "tf_exp": 0.0}, SAMPLED),
        (EVERYTHING, MOMENTS | SAMPLED | INPUTS),
    ],
)
@pytest.mark.parametrize("signal", ["gate", "product"])
def test_only_what_the_recipe_needs_is_collected(chosen: dict, expected: set[str], signal: str) -> None:
    table, _ = collect(GatedMLP(), documents([4, 4]), Recipe(**chosen, signal=signal), batch_size=2)
    assert table.columns().keys() == expected | {"document", "tokens"}


def test_linears_that_share_an_input_share_a_column() -> None:
    mlp, x = GatedMLP(), documents([4])[0]
    mlp.q_proj, mlp.k_proj, mlp.v_proj, mlp.o_proj = (nn.Linear(*sizes) for sizes in ((6, 3), (6, 3), (6, 3), (3, 6)))
    layer = resolve_layer(mlp, 0)
    c = LayerCollector(layer, layer.blocks(include_attention=True), Recipe(method="wanda"))
    with torch.no_grad(), c:
        mlp(x[None])
        mlp.k_proj(x[None])
        mlp.o_proj(mlp.q_proj(x[None]))
        c.add_documents(0, 4)
    of_mlp, of_attention = (table.input_mean_square for table in c.statistics())
    assert of_mlp.keys() == {"gate_proj", "down_proj"}
    assert of_attention.keys() == {"q_proj", "o_proj"}
    assert np.array_equal(of_attention["q_proj"], of_mlp["gate_proj"])
