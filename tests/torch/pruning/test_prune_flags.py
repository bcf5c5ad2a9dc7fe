"""Every number of the recipe reaches the masks of the methods that read it, and of no others."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from pruning import MLP, pruned, recipe, small, zeros

from neuronrank_core import METHODS

#: Two values of each field that lead to different masks.
VALUES = {
    "tfidf_mode": ("doc", "topic"),
    "tfidf_k": (3, 12),
    "q_active": (0.6, 0.9),
    "signal": ("gate", "product"),
    "threshold": (0.0, 0.8),
    "tokens_per_document": (16, 3),
    "weight_exp": (1.0, 2.0),
    "input_exp": (0.0, 1.0),
    "tf_exp": (1.0, 3.0),
    "idf_exp": (1.0, 5.0),
    "spikiness_exp": (0.5, 3.0),
    "magnitude_multi": (0.0, 2.0),
    "variance_multi": (1.0, 9.0),
    "variance_exp": (1.0, 3.0),
    "token_weight": (0.0, 5.0),
}
#: What has to be chosen for a field to matter.
SETTING = {
    "tfidf_k": {"tfidf_mode": "topic"},
    "threshold": {"tfidf_mode": "token"},
    "variance_multi": {"magnitude_multi": 1.0},
}
#: Every factor at work.
ALL_ON = {"idf_exp": 1.0, "spikiness_exp": 0.5}


@cache
def masks(method: str, **chosen: object) -> bytes:
    model = small(layers=1)
    pruned(model, recipe(**{**ALL_ON, **chosen, "method": method}))
    return b"".join(zeros(model, 0)[name].tobytes() for name in MLP)


@pytest.mark.parametrize(("method", "name"), [(m.name, name) for m in METHODS.values() for name in sorted(m.reads)])
def test_what_is_read_changes_the_masks(method: str, name: str) -> None:
    one, other = (masks(method, **{**SETTING.get(name, {}), name: value}) for value in VALUES[name])
    assert one != other


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_read_does_not(method: str) -> None:
    for name in VALUES.keys() - METHODS[method].reads:
        assert masks(method, **{name: VALUES[name][1]}) == masks(method), name


@pytest.mark.parametrize("name", ["nsamples", "seqlen", "seed"])
def test_the_text_that_is_drawn_changes_the_masks(name: str) -> None:
    values = {"nsamples": 12, "seqlen": 50, "seed": 3}
    assert masks("wanda", **{name: values[name]}) != masks("wanda")


@pytest.mark.parametrize("compare", ["module", "row", "column"])
def test_comparison_groups(compare: str) -> None:
    model = small(layers=1)
    pruned(model, recipe(method="magnitude", compare=compare))
    weight = model.model.layers[0].mlp.gate_proj.weight
    for along in (0, 1):
        counts = (weight == 0).sum(dim=along)
        even = compare == {0: "column", 1: "row"}[along]
        assert bool((counts == counts[0]).all()) == even
    assert torch.count_nonzero(weight) == weight.numel() // 2
