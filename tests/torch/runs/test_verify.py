"""The verification passes where torch is right, and names what is wrong where a kernel is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pruning import TEXT, same_state, state
from tiny import Family, tiny_model
from tiny_files import write_model
from torch import Tensor, nn

import neuronrank_torch.calibration.collector
import neuronrank_torch.runs.verify.run
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.runs.verify import contract
from neuronrank_torch.runs.verify.run import run_verify
from neuronrank_torch.runs.verify.verify_result import VerifyResult

Broken = Callable[..., Any]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_model(tmp_path / "m", tiny_model(getattr(request, "param", "llama"), layers=3, hidden=32, intermediate=64))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def verify(folder: Path, **options: Any) -> VerifyResult:
    return run_verify(
        str(folder / "m"), **{"dataset": str(folder / "text.txt"), "seqlen": 32, "device": "cpu", **options}
    )


def broken(result: VerifyResult) -> set[str]:
    return {name for layer in result.layers for name, check in layer.checks.items() if not check.holds}


@pytest.mark.parametrize("folder", get_args(Family), indirect=True)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_torch_keeps_the_contract(folder: Path, batch_size: int) -> None:
    result = verify(folder, batch_size=batch_size)
    assert result.holds
    assert broken(result) == set()
    assert [layer.layer for layer in result.layers] == [0, 1, 2]
    assert result.cost == ()
    checks = result.layers[2].checks
    assert checks["gate_proj mask"].size == 64 * 32
    assert checks["sample"].size == 4 * 32 * 64
    assert checks["sample"].worst == 0
    assert checks["topics"].size == 4 * 32
    # Another precision is at work, so nothing to compare would show.
    assert 0 < checks["gate_proj scores"].worst < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_it_and_has_a_cost(folder: Path, dtype: str) -> None:
    result = verify(folder, dtype=dtype, layers=2)
    assert result.holds
    assert result.dtype == dtype
    assert [layer.layer for layer in result.cost] == [0, 1]
    eps = torch.finfo(getattr(torch, dtype)).eps
    for layer in result.cost:
        for name, changed in layer.changed.items():
            assert changed < (0.1 if "mask" in name else 20 * eps), name
        assert layer.changed["signal_mean"] > eps / 100
    if dtype == "bfloat16":
        assert result.cost[1].changed["gate_proj mask"] > 0


def test_layers_from_the_first_and_no_more_than_there_are(folder: Path) -> None:
    assert len(verify(folder, layers=1).layers) == 1
    assert len(verify(folder, layers=9).layers) == 3


def test_the_same_twice_and_another_seed_differs(folder: Path) -> None:
    one, again, other = (verify(folder, layers=1, seed=seed).layers for seed in (0, 0, 1))
    assert one == again != other


def test_the_model_is_left_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[nn.Module] = []
    load = neuronrank_torch.runs.verify.run.load_model

    def keep(*arguments: Any, **options: Any) -> Any:
        loaded.append(load(*arguments, **options)[0])
        before.update(state(loaded[0]))
        return loaded[0], *load(*arguments, **options)[1:]

    before: dict[str, Tensor] = {}
    monkeypatch.setattr(neuronrank_torch.runs.verify.run, "load_model", keep)
    verify(folder, layers=2)
    assert same_state(before, state(loaded[0]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded[0].modules())


def late_ties(original: Broken) -> Broken:
    """Ties to the highest index."""
    return lambda self, scores, k: original(self, scores.flip(1), k).flip(1)


def one_short(original: Broken) -> Broken:
    return lambda self, scores, k: original(self, scores, max(k - 1, 0))


def next_rank(original: Broken) -> Broken:
    return lambda self, sample, q: original(self, sample, q + 1 / (len(sample) - 1))


def strictly_above(original: Broken) -> Broken:
    return lambda self, sample, tau, labels, groups: original(self, sample, np.nextafter(tau, 1e9), labels, groups)


def off(factor: float) -> Callable[[Broken], Broken]:
    return lambda original: lambda self, *arguments: original(self, *arguments) * factor


def rotated(original: Broken) -> Broken:
    return lambda self, sample, k, seed: (original(self, sample, k, seed) + 1) % k


def half_norm(original: Broken) -> Broken:
    return lambda self, weight: original(self, weight.bfloat16().float())


MASKS = {"gate_proj mask", "up_proj mask", "down_proj mask"}
SCORES = {"gate_proj scores", "up_proj scores"}


@pytest.mark.parametrize(
    ("kernel", "wrong", "found"),
    [
        ("lowest_k", late_ties, MASKS),
        ("lowest_k", one_short, MASKS),
        ("quantile_threshold", next_rank, {"df"}),
        ("active_tokens", strictly_above, {"df"}),
        ("group_means", off(1 + 3e-5), {"tf"}),
        ("column_norm", off(1 + 3e-5), SCORES),
        ("column_norm", half_norm, SCORES),
        ("topics", rotated, {"topics"}),
    ],
)
def test_a_broken_kernel_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, wrong: Callable[[Broken], Broken], found: set[str]
) -> None:
    monkeypatch.setattr(TorchKernels, kernel, wrong(getattr(TorchKernels, kernel)))
    result = verify(folder)
    assert not result.holds
    assert found <= broken(result)
    # What does not follow from the kernel stays out of it.
    innocent = {"signal_mean", "signal_max", "open_gate", "sample", "spikiness", "down_proj scores"}
    assert not innocent & broken(result)


def test_a_broken_collector_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal = neuronrank_torch.calibration.collector._TableBuilder._see_signal

    def rounded(self: Any, activation: Tensor) -> None:
        signal(self, activation)
        self._batch["signal_mean"] = self._batch["signal_mean"].half().float()

    monkeypatch.setattr(neuronrank_torch.calibration.collector._TableBuilder, "_see_signal", rounded)
    result = verify(folder)
    assert {"signal_mean", "spikiness"} <= broken(result)
    assert not {"signal_max", "df", "tf", "topics"} & broken(result)


def test_real_values() -> None:
    assert contract.real("x", [1.0, 2.0], [1.0, 2.0]).worst == 0
    assert contract.real("x", [1.0, 2.0 + 4e-5], [1.0, 2.0]).worst == pytest.approx(2e-5)
    assert not contract.real("x", [1.0, 2.0 + 4e-5], [1.0, 2.0]).holds
    assert contract.real("x", [0.0, -3.0], [0.0, -3.0]).holds
    for wrong in ([1e-9, 1.0], [np.nan, 1.0], [np.inf, 1.0], [0.0]):
        assert not contract.real("x", wrong, [0.0, 1.0]).holds, wrong
        assert np.isfinite(contract.real("x", wrong, [0.0, 1.0]).worst), wrong


def test_counts() -> None:
    assert contract.counts("x", [1, 2], [1, 2]).holds
    assert contract.counts("x", [1, 2, 4], [1, 3, 5]).worst == 2
    assert contract.counts("x", [1], [1, 3, 5]).worst == 3


def test_topics_may_differ_where_they_nearly_tie() -> None:
    margins = np.array([0.2, 1e-6, 0.3])
    mine, theirs = np.array([0, 1, 2]), np.array([0, 0, 1])
    check = contract.topic_labels("x", mine, theirs, margins, clear=True)
    assert (check.worst, check.near_ties, check.margin) == (1, 1, 0.3)
    check = contract.topic_labels("x", mine, theirs, margins, clear=False)
    assert (check.worst, check.near_ties, check.size) == (0, 2, 0)


def test_masks_may_differ_where_scores_nearly_tie() -> None:
    score = np.array([[1.0, 2.0, 2.00002, 3.0]])
    reference = np.array([[True, True, False, False]])
    swapped = np.array([[True, False, True, False]])
    check = contract.masks("x", swapped, reference, score, group=4, unequal=0)
    assert (check.worst, check.near_ties) == (0, 2)
    assert check.margin == pytest.approx(1e-5, rel=1e-3)
    check = contract.masks("x", np.array([[True, False, False, True]]), reference, score, group=4, unequal=0)
    # The second is a near-tie with the third, and the fourth is none with the second.
    assert (check.worst, check.near_ties) == (1, 1)
    assert check.margin == pytest.approx(1 / 3)
    assert contract.masks("x", reference, reference, score, group=4, unequal=5).worst == 5
