"""The GPU check notices a wrong kernel, goes on after a step that fails, and says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import gpu_check
import gpu_kernels

from neuronrank_torch import kernels
from neuronrank_torch.kernels import TorchKernels


@pytest.mark.parametrize("dtype", gpu_check.DTYPES)
def test_the_kernels_keep_the_contract(dtype: str) -> None:
    result = gpu_kernels.check_kernels(dtype)
    assert result["wrong"] == []
    assert result["checks"] > 10


def test_wrong_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, lowest = kernels.mean_square, TorchKernels.lowest_k
    monkeypatch.setattr(kernels, "mean_square", lambda x: mean(x) * (1 + 3e-5))
    monkeypatch.setattr(TorchKernels, "lowest_k", lambda self, scores, k: lowest(self, scores, k).flip(0))
    result = gpu_kernels.check_kernels("float32")
    assert not result["ok"]
    assert "mean_square" in result["wrong"]
    assert any("lowest_k" in name for name in result["wrong"])


def test_a_step_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, object]:
        raise RuntimeError("this | broke")

    steps = {"first": fail, "second": lambda: {"found": {"seconds": 1.0, "GiB": 2.0}}}
    monkeypatch.setattr(gpu_check, "steps", lambda model, work: steps)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--model", "none", "--out", str(tmp_path / "out" / "page")])
    assert gpu_check.main() == 1
    report = json.loads((tmp_path / "out" / "page.json").read_text())
    assert report["rehearsal"] is not torch.cuda.is_available()
    assert [step["ok"] for step in report["steps"].values()] == [False, True]
    page = (tmp_path / "out" / "page.md").read_text()
    assert "| first | **FAILED** |" in page
    assert "this / broke" in page
    assert "found: 1.0 s, 2.0 GiB" in page
    assert "REHEARSAL" in page or torch.cuda.is_available()
    steps.pop("first")
    assert gpu_check.main() == 0
