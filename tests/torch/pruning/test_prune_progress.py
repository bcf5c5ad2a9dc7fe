"""Each layer runs as often as it has to and no more, and progress adds up."""

from __future__ import annotations

import hashlib

import pytest
from pruning import TEXT, pruned, recipe, small

from neuronrank_core.methods import decided
from neuronrank_torch.pruning.result import Calibration
from neuronrank_torch.schema import to_json


@pytest.mark.parametrize(
    ("chosen", "passes"),
    [
        ({}, [2, 2, 1]),
        ({"propagate": "dense"}, [1, 1, 1]),
        ({"pruning_last": 1}, [1, 1, 1]),
        ({"pruning_last": 2}, [1, 2, 1]),
        ({"prune_lm_head": True}, [2, 2, 2]),
        ({"prune_lm_head": True, "propagate": "dense"}, [1, 1, 1]),
    ],
    ids=str,
)
@pytest.mark.parametrize(("batch_size", "batches"), [(1, 6), (4, 2), (6, 1), (100, 1)])
def test_passes_and_progress(chosen: dict, passes: list[int], batch_size: int, batches: int) -> None:
    model = small(layers=3, tied=False)
    runs, heard = [0, 0, 0], []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    asked = recipe(method="wanda", **chosen)
    pruned(model, asked, batch_size=batch_size, progress=lambda *step: heard.append(step))
    # Once more, on short sequences, before anything is changed. The first layer of a kind also runs two batches in each
    # of both runs, to see that sequences are independent.
    alone = batch_size == 1
    assert runs == [n * batches + 1 + (4 if index == 0 and not alone else 0) for index, n in enumerate(passes)]
    total = sum(passes) * batches
    assert [done for _, done, _, _ in heard] == list(range(1, total + 1))
    assert {(of, unit) for *_, of, unit in heard} == {(total, "micro-batches")}
    assert [stage for stage, *_ in heard] == [
        f"calibrating layer {i + 1} of 3" for i, n in enumerate(passes) for _ in range(n * batches)
    ]


def test_without_calibration_a_layer_is_a_step() -> None:
    heard: list = []
    pruned(small(layers=3), recipe(method="magnitude"), progress=lambda *step: heard.append(step))
    assert heard == [(f"pruning layer {i} of 3", i, 3, "layers") for i in (1, 2, 3)]


def test_the_report_says_what_was_done() -> None:
    model, asked = small(), recipe(method="neuronrank_wanda")
    report = pruned(model, asked)
    assert report.recipe == decided(asked)
    assert report.total.parameters == sum(p.numel() for p in model.parameters())
    assert report.calibration == Calibration(6 * 32, hashlib.sha256(TEXT.encode()).hexdigest())
    assert [layer.layer for layer in report.layers] == [0, 1]
    plain = to_json(report)
    assert plain["total"]["prunable"] == 2 * 3 * 64 * 32 == 2 * plain["total"]["zeros"]
    assert plain["layers"][0]["modules"]["up_proj"]["sparsity"] == 0.5
    assert plain["recipe"]["sparsity_ratio"] == 0.5
    assert plain["recipe"]["tf_exp"] == 0.5
    assert 0 < plain["layers"][0]["seconds"] <= plain["seconds"] + 0.001
