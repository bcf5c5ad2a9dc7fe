"""A run depends on its seed and its text, not on the hour, the micro-batches or what ran before."""

from __future__ import annotations

import copy

import pytest
import torch
from pruning import MLP, core_scores, disagreements, pruned, recipe, same_state, small, state, zeros

from neuronrank_core import METHODS

TOPIC = {"method": "neuronrank_tfidf", "tfidf_mode": "topic"}


@pytest.mark.parametrize("chosen", [*({"method": method} for method in METHODS), TOPIC], ids=str)
def test_the_same_seed_gives_the_same_bits(chosen: dict) -> None:
    results = []
    for noise in range(2):
        model = small()
        torch.manual_seed(noise)
        pruned(model, recipe(**chosen))
        results.append(state(model))
    assert same_state(*results)


@pytest.mark.parametrize("chosen", [{"method": "wanda"}, TOPIC], ids=str)
def test_another_seed_draws_other_text(chosen: dict) -> None:
    one, other = small(), small()
    pruned(one, recipe(**chosen, seed=0))
    pruned(other, recipe(**chosen, seed=1))
    assert not same_state(state(one), state(other))


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    pruned(small(), recipe(**TOPIC))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("method", ["wanda", "neuronrank_wanda", "neuronrank_unstructured", "neuronrank_old", "dass"])
def test_micro_batches_decide_nothing_but_near_ties(method: str) -> None:
    masks = []
    for batch_size in (1, 4):
        model, asked = small(), recipe(method=method, propagate="dense")
        dense = copy.deepcopy(model)
        pruned(model, asked, batch_size=batch_size)
        masks.append([zeros(model, layer) for layer in range(2)])
        for layer in range(2):
            scores = core_scores(dense, layer, asked)
            assert all(disagreements(masks[-1][layer][x], scores[x], x, asked) == 0 for x in MLP)
    differ = sum((a[x] != b[x]).sum() for a, b in zip(*masks, strict=True) for x in MLP)
    assert differ <= 4


def test_an_iterable_of_texts_is_joined_by_blank_lines() -> None:
    parts = ["first part of the text " * 20, "second part " * 20]
    one, other = small(), small()
    a = pruned(one, recipe(), parts)
    b = pruned(other, recipe(), "\n\n".join(parts))
    assert same_state(state(one), state(other))
    assert a.calibration == b.calibration
