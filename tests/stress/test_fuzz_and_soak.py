"""The fuzz and the soak of benchmarks/ in short, and that they see what they are there for."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from neuronrank_torch.model import folder
from neuronrank_torch.runs import evaluate

BENCHMARKS = Path(__file__).parent
EVAL = ["eval", "--model", "model", "--dataset", "text.txt", "--seqlen", "16", "--windows", "2"]


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(request.param)


fuzz = pytest.mark.parametrize("benchmark", ["fuzz"], indirect=True)
soak = pytest.mark.parametrize("benchmark", ["soak"], indirect=True)


@fuzz
def test_nothing_ends_in_a_traceback(benchmark: ModuleType) -> None:
    for name, result in benchmark.fuzz(60, seed=3).items():
        assert result.problems == [], name
        assert result.ends.total() >= 60
        # Were they all refused at the first flag, this would show little.
        assert result.ends["exit 0"] > 0
        assert result.ends["exit 2"] > 0


def surprised(*_: Any) -> Any:
    raise KeyError("surprise")


def endless(*_: Any) -> Any:
    for _number in itertools.count():
        pass


def left_behind(*_: Any) -> Any:
    Path("out").mkdir()
    raise OSError("no")


@fuzz
@pytest.mark.parametrize(
    ("owner", "name", "act", "problem"),
    [
        (evaluate, "read_documents", surprised, "unexpected error"),
        (folder, "read_json", lambda *_: None, "a bug was taken for wrong input"),
        (evaluate, "read_documents", endless, "hang"),
        (evaluate, "read_documents", left_behind, "something is left under the output's name"),
        (evaluate, "read_documents", lambda *_: exit(7), "exit code 7"),
    ],
    ids=["surprise", "bug", "hang", "left", "code"],
)
def test_problems_are_seen(
    benchmark: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    act: Callable[..., Any],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    save_file({"weight": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "text.txt").write_text(benchmark.TEXT)
    monkeypatch.setattr(owner, name, act)
    assert problem in benchmark.ended(EVAL, 0.5 if act is endless else 60)[1]


@fuzz
def test_what_is_as_it_should_be_is_no_problem(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert benchmark.ended(EVAL, 60) == ("exit 2", "")


@soak
def test_prunes_leave_nothing_behind(benchmark: ModuleType) -> None:
    with benchmark.small_model(32) as (place, model, size):
        states = [benchmark.in_use() for number in benchmark.prunes(place, model, 6) if number in (2, 6)]
    for state in states:
        state["resident"] = 0  # Other tests have a share in it.
    assert benchmark.flat(*states, size)


@soak
def test_what_is_left_behind_is_seen(benchmark: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "leak.safetensors"
    save_file({"x": torch.ones(4096)}, file)
    before = {**benchmark.in_use(), "resident": 0}
    with file.open(), safe_open(file, framework="pt") as mapped:
        kept = [torch.ones(3), torch.nn.Linear(3, 3), mapped]
        after = {**benchmark.in_use(), "resident": 0}
    assert len(kept) == 3
    assert benchmark.flat(before, before, 0)
    for what in ("tensors", "modules", "open files", "mapped files"):
        assert after[what] > before[what]
        assert not benchmark.flat(before, {**before, what: after[what]}, 1000)
    assert benchmark.flat(before, {**before, "resident": 50}, 1000)
    assert not benchmark.flat(before, {**before, "resident": 51}, 1000)
