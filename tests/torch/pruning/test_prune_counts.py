"""Every method removes exactly what was asked for, and touches nothing else, in every family."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch
from pruning import ATTENTION, MLP, linears, pruned, recipe, small, state
from tiny import Family
from torch import nn

from neuronrank_core import METHODS, Recipe
from neuronrank_torch.schema import to_json

FAMILIES = get_args(Family)


def check(model: nn.Module, chosen: Recipe, modules: tuple[str, ...] = MLP) -> None:
    before, layers = state(model), range(len(model.model.layers))
    report = pruned(model, chosen)
    expected = {}
    for layer in layers:
        for name in modules:
            weight = linears(model, layer)[name].weight
            rows, columns = weight.shape
            compare = METHODS[chosen.method if name in MLP else METHODS[chosen.method].beyond_mlp].compare(name)
            by_row = rows * int(chosen.ratio * columns)
            by_compare = {"module": int(chosen.ratio * rows * columns), "column": columns * int(chosen.ratio * rows)}
            count = by_row if chosen.pattern else by_compare.get(compare, by_row)
            assert int((weight == 0).sum()) == count, (layer, name)
            if compare == "row":
                assert set((weight == 0).sum(dim=1).tolist()) == {int(chosen.ratio * columns)}
            expected[layer, name] = count
    assert {(x.layer, name): m.zeros for x in report.layers for name, m in x.modules.items()} == expected
    for name, parameter in model.named_parameters():
        kept = parameter != 0 if name.split(".")[-2] in modules else torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter[kept], before[name][kept]), name
    assert report.total.zeros == sum(expected.values())
    json.dumps(to_json(report), allow_nan=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity_type", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", METHODS)
def test_half_of_every_mlp_module(method: str, sparsity_type: str, family: Family) -> None:
    check(small(family), recipe(method=method, sparsity_type=sparsity_type))


@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.9, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_other_ratios(method: str, ratio: float) -> None:
    check(small(), recipe(method=method, sparsity_ratio=ratio))


def test_ratio_0_changes_nothing() -> None:
    check(small(), recipe(method="neuronrank_tfidf", sparsity_ratio=0.0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity_type", ["unstructured", "4:8"])
def test_attention_too(method: str, sparsity_type: str) -> None:
    check(small(), recipe(method=method, include_attention=True, sparsity_type=sparsity_type), MLP + ATTENTION)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    model = small().to(dtype)
    check(model, recipe(method=method))
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_n_of_every_m_inputs_go(n: int, m: int) -> None:
    model = small()
    pruned(model, recipe(sparsity_type=f"{n}:{m}"))
    for layer in range(2):
        for name in MLP:
            groups = (linears(model, layer)[name].weight == 0).reshape(-1, m)
            assert (groups.sum(dim=1) == n).all()
