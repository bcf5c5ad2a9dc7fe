"""Tests that ``--json`` of every command and ``neuronrank.json`` fit the dataclasses, which the documentation lists."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command import Run
from pages import DOCS

from neuronrank_core import InputError
from neuronrank_torch.schema import from_json, to_json


@pytest.fixture(scope="module")
def from_code() -> ModuleType:
    """The Sphinx extension that generates the page of results."""
    pytest.importorskip("sphinx")
    pytest.importorskip("numpydoc")
    sys.path.insert(0, str(DOCS / "extensions"))
    try:
        import from_code
    finally:
        sys.path.pop(0)
    return from_code


def check(kind: Any, content: dict[str, Any]) -> None:
    """Fails for an unknown key, a missing key, and a value of another type, at any depth."""
    assert to_json(from_json(kind, content, "result", "")) == content
    assert content["schema"] == kind.schema


@pytest.fixture
def answer(run: Run) -> Any:
    def call(*arguments: object) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
        return result

    return call


def test_prune(answer: Any, small: list[object], measured: list[object], tmp_path: Path) -> None:
    from neuronrank_torch.runs.prune_result import PruneResult

    done = answer("prune", *small, *measured, "--nr-include-attention", "--save", "out")
    assert done["perplexity"] is not None
    check(PruneResult, done)
    assert json.loads((tmp_path / "out" / "neuronrank.json").read_text("utf-8")) == done
    for flags in (["--dry-run"], ["--dry-run", *measured], ["--save", "b", "--prune_method", "magnitude"]):
        check(PruneResult, answer("prune", *small, *flags))
    sized = answer("prune", *small, "--nsamples", 16, "--target-params", 0.8, "--save", "sized")
    check(PruneResult, sized)
    assert sized["choice"]["passes"]
    assert json.loads((tmp_path / "sized" / "neuronrank.json").read_text("utf-8")) == sized
    check(PruneResult, answer("prune", *small, "--target-params", 0.8, "--dry-run"))
    for kind in ("neurons", "heads", "layers"):
        smaller = answer("prune", *small, "--sparsity_type", kind, "--save", kind)
        check(PruneResult, smaller)
        assert smaller["total"]["removed"] > 0
        assert json.loads((tmp_path / kind / "neuronrank.json").read_text("utf-8")) == smaller


def test_eval(answer: Any, small: list[object]) -> None:
    from neuronrank_torch.runs.evaluate import EvalResult

    for flags in ((), ("--reference", small[1])):
        check(EvalResult, answer("eval", *small[:4], "--seqlen", 32, "--windows", 1, *flags))


def test_collect_merge_and_what_uses_them(answer: Any, small: list[object]) -> None:
    from neuronrank_torch.runs.collect import CollectResult
    from neuronrank_torch.runs.prune_result import PruneResult
    from neuronrank_torch.runs.tune.tune_result import TuneResult

    parts = [*small, "--batch-size", 2]
    check(CollectResult, answer("collect", *parts, "--documents", "0:2", "--save", "a"))
    check(CollectResult, answer("collect", *parts, "--documents", "2:4", "--save", "b"))
    merged = answer("merge", "a", "b", "--save", "stats")
    check(CollectResult, merged)
    assert merged["save"] == "stats"
    check(PruneResult, answer("prune", *small[:2], "--stats", "stats", "--save", "out"))
    search = ["tune", *small[:2], "--stats", "stats", "--trials", 11, "--eval-dataset", small[3], "--eval-windows", 1]
    tested = ["--test-dataset", "builtin", "--test-windows", 1, "--prune_method", "wanda"]
    check(TuneResult, answer(*search, *tested, "--save", "one.toml"))


def test_sweep(answer: Any, small: list[object]) -> None:
    from neuronrank_torch.runs.sweep_result import SweepResult

    brief = ["--eval-dataset", small[3], "--eval-windows", 1, "--sparsity_ratio", 0.5, "--out", "cells.jsonl"]
    check(SweepResult, answer("sweep", *small, *brief))


def test_verify(answer: Any, small: list[object]) -> None:
    from neuronrank_torch.runs.verify.verify_result import VerifyResult

    for dtype in ("float32", "bfloat16"):
        check(VerifyResult, answer("verify", *small, "--layers", 1, "--device", "cpu", "--dtype", dtype))


def test_compare(answer: Any, run: Run, small: list[object], measured: list[object]) -> None:
    from neuronrank_torch.runs.compare import CompareResult

    run("prune", *small, "--save", "a")
    check(CompareResult, answer("compare", small[1], "a"))
    check(CompareResult, answer("compare", small[1], "a", *measured, "--speed", "--seqlen", 32))
    check(CompareResult, answer("compare", small[1], small[1]))


def test_tasks() -> None:
    """As lm-eval gives them; the run itself is in test_tasks.py."""
    from neuronrank_torch.runs.tasks import TasksResult

    metrics = {"alias": "cats", "acc,none": 0.75, "acc_stderr,none": None}
    result = TasksResult("m", {"cats": metrics}, {"cats": 2.0}, {"cats": 3}, None, "0.4.9")
    check(TasksResult, json.loads(json.dumps(to_json(result))))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["total"].pop("zeros"),
        lambda content: content["total"].update(more=1),
        lambda content: content.update(seconds="1"),
        lambda content: content["total"].update(zeros=True),
        lambda content: content["recipe"].update(nsamples=1.5),
        lambda content: content.pop("plan"),
    ],
)
def test_what_does_not_fit_is_seen(answer: Any, small: list[object], change: Any) -> None:
    from neuronrank_torch.runs.prune_result import PruneResult

    content = answer("prune", *small, "--dry-run")
    check(PruneResult, content)
    change(content)
    with pytest.raises((AssertionError, InputError)):
        check(PruneResult, content)


def test_the_page_lists_every_result_and_explains_every_field(from_code: ModuleType) -> None:
    page = "```{results}\n```" in (DOCS / "reference" / "results.md").read_text("utf-8")
    assert page
    assert "reference/results\n" in (DOCS / "index.md").read_text("utf-8")
    kinds = from_code.result_types()
    results = {
        name
        for file in (DOCS.parent / "neuronrank_torch" / "runs").rglob("*.py")
        for line in file.read_text("utf-8").splitlines()
        if line.startswith("class ") and (name := line[6:].partition("(")[0].partition(":")[0]).endswith("Result")
    }
    assert {kind.__name__ for kind in kinds.values()} == results
    for kind in dict.fromkeys(part for one in kinds.values() for part in (one, *from_code.parts_of(one))):
        rows = from_code.field_table(kind).splitlines()[2:]
        assert [row.split("`")[1] for row in rows] == list(kind.__dataclass_fields__)
        obvious = {"total", "calibration", "layers", "cost"}
        unexplained = {row.split("`")[1] for row in rows if row.endswith("|  |")}
        assert unexplained <= obvious, kind
