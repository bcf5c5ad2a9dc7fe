"""``neuronrank sweep`` as a user meets it, on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command import Run
from safetensors.torch import load_file, save_file
from tiny_files import write_model
from tiny_types import tiny_type

import neuronrank_cli.commands.sweep
import neuronrank_torch.runs.sweep
from neuronrank_cli.commands.sweep import sweep
from neuronrank_core import InputError, NonFiniteError, Recipe
from neuronrank_torch.runs.job import Evaluation
from neuronrank_torch.runs.sweep import SweepJob

METHODS = ("--prune_method", "magnitude", "--prune_method", "neuronrank_wanda")
#: Flag to values, and what they change: the job, the evaluation or the recipe.
FLAGS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "--model": (["o"], {"model": "o"}),
    "--device": (["cuda"], {"device": "cuda"}),
    "--dtype": (["bfloat16"], {"dtype": "bfloat16"}),
    "--sparsity_ratio": ([0.2, 0.1], {"ratios": (0.2, 0.1)}),
    "--prune_method": (["ria", "dass"], {"methods": ("ria", "dass")}),
    "--update": (["gradual", "none"], {"updates": ("gradual", "none")}),
    "--sparsity_type": (["4:8"], {"sparsity_type": "4:8", "ratios": (0.5,)}),
    "--allocate": (["neuronrank"], {"allocate": "neuronrank"}),
    "--pruning_last": ([2], {"pruning_last": 2}),
    "--nr-include-attention": ([], {"include_attention": True}),
    "--nr-prune-lm-head": ([], {"prune_lm_head": True}),
    "--dataset": (["d"], {"dataset": "d"}),
    "--stats": (["t"], {"stats": "t"}),
    "--nsamples": ([5], {"nsamples": 5}),
    "--seqlen": ([64], {"seqlen": 64, "evaluation": {"seqlen": 64}}),
    "--bos": (["text"], {"bos": "text", "evaluation": {"bos": "text"}}),
    "--propagate": (["dense"], {"propagate": "dense"}),
    "--seed": ([3], {"seed": 3}),
    "--batch-size": ([2], {"batch_size": 2}),
    "--eval-dataset": (["e"], {"evaluation": {"dataset": "e"}}),
    "--eval-windows": ([3], {"evaluation": {"windows": 3}}),
    "--out": (["x.jsonl"], {"out": "x.jsonl"}),
    "--force": ([], {"force": True}),
}


@pytest.fixture
def swept(small: list[object], text: Path) -> list[object]:
    """Flags of a sweep of four cells."""
    ratios = ["--sparsity_ratio", 0.6, "--sparsity_ratio", 0.3]
    return ["sweep", *small, *METHODS, *ratios, "--eval-dataset", text, "--eval-windows", 2, "--out", "cells.jsonl"]


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("cells.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_read(run: Run, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    assert {*FLAGS, "--json", "--config", "--figure"} == {p.opts[0] for p in sweep.params}
    seen: list[Any] = []

    def run_sweep(job: SweepJob, recipe: Recipe, progress: Any) -> Any:
        assert callable(progress)
        seen.append((job, recipe))
        raise InputError("enough")

    monkeypatch.setattr(neuronrank_torch.runs.sweep, "run_sweep", run_sweep)
    values, changed = FLAGS[flag]
    changed = dict(changed)
    given = [part for value in values for part in (flag, value)] or [flag]
    run("sweep", *(["--model", "m"] if flag != "--model" else []), "--out", "c.jsonl", *given, code=2)
    ((job, recipe),) = seen
    evaluation = Evaluation(**{"windows": 8, **changed.pop("evaluation", {})})
    own = {name: value for name, value in changed.items() if name in SweepJob.__dataclass_fields__}
    base = {"model": "m", "out": "c.jsonl", "ratios": (0.3, 0.5, 0.6, 0.7), "methods": ("wanda", "neuronrank_wanda")}
    assert job == SweepJob(**{**base, **own}, evaluation=evaluation)
    assert recipe == Recipe(**{name: value for name, value in changed.items() if name not in own})


def test_each_cell_is_what_prune_measures(run: Run, swept: list[object], small: list[object], text: Path) -> None:
    result = json.loads(run(*swept, "--update", "none", "--update", "least-squares", "--json").stdout)
    assert [(c["method"], c["update"], c["ratio"]) for c in result["cells"]] == [
        (method, update, ratio)
        for method in ("magnitude", "neuronrank_wanda")
        for update in ("none", "least-squares")
        for ratio in (0.6, 0.3)
    ]
    for cell in result["cells"]:
        flags = ["--prune_method", cell["method"], "--update", cell["update"], "--sparsity_ratio", cell["ratio"]]
        pruned = ["prune", *small, *flags, "--eval", "--eval-dataset", text, "--eval-windows", 2, "--json"]
        report = json.loads(run(*pruned).stdout)
        after = report["perplexity"]["after"]
        assert (cell["perplexity"], cell["standard_error"]) == (after["perplexity"], after["standard_error"])
        assert cell["share"] == pytest.approx(report["total"]["zeros"] / report["total"]["prunable"])
        assert result["dense"]["perplexity"] == report["perplexity"]["before"]["perplexity"]
    cells = [{name: value for name, value in line.items() if name != "setup"} for line in lines()]
    assert cells == [{"dense": result["dense"]}, *result["cells"]]


def test_statistics_take_the_place_of_the_text(run: Run, swept: list[object], small: list[object]) -> None:
    run("collect", *small, "--save", "stats")
    by_stats = run(*swept, "--stats", "stats", "--json")
    assert "Warning: --dataset has no effect with --stats" in by_stats.stderr
    result = json.loads(by_stats.stdout)
    dense = json.loads(run(*swept, "--propagate", "dense", "--out", "dense.jsonl", "--json").stdout)
    found = [[cell["perplexity"] for cell in one["cells"]] for one in (result, dense)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert any("the calibration text" in note for note in result["notes"])


def test_what_is_there_is_not_run_again(run: Run, swept: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    prune, calls = neuronrank_torch.runs.sweep.prune, []

    def stop_at_third(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prune(*arguments, **options)

    monkeypatch.setattr(neuronrank_torch.runs.sweep, "prune", stop_at_third)
    stopped = run(*swept, code=130)
    assert "2 of 4 cells are finished and kept; rerun the same command to resume" in stopped.stderr
    before = lines()
    assert len(before) == 3
    run(*swept)
    assert len(calls) == 5  # Two, the one that was stopped, and the two that were missing.
    assert lines()[:3] == before
    run(*swept, "--sparsity_ratio", 0.5)  # Two more.
    assert len(calls) == 7
    refused = run(*swept, "--seed", 1, code=2)
    assert "cells.jsonl contains a different sweep: recipe seed was 0, is 1" in refused.stderr
    run(*swept, "--seed", 1, "--force")
    assert {line["setup"]["recipe"]["seed"] for line in lines()} == {1}
    assert len(lines()) == 5


def test_another_sweep_does_not_write_to_the_same_file(
    run: Run, swept: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prune, refused = neuronrank_torch.runs.sweep.prune, []

    def start_another(*arguments: Any, **options: Any) -> Any:
        if not refused:
            refused.append(run(*swept, "--prune_method", "ria", code=1))
        return prune(*arguments, **options)

    monkeypatch.setattr(neuronrank_torch.runs.sweep, "prune", start_another)
    run(*swept)
    assert "another sweep is writing to cells.jsonl" in refused[0].stderr
    assert "wait for it, or choose another --out" in refused[0].stderr
    assert len(lines()) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["cells.jsonl"]


@pytest.mark.parametrize("content", ["[1]", "1", '{"setup": 1}', "no json"])
def test_a_file_of_something_else_is_refused(run: Run, swept: list[object], content: str) -> None:
    Path("cells.jsonl").write_text(content + "\n", encoding="utf-8")
    assert "cells.jsonl" in run(*swept, code=2).stderr
    assert Path("cells.jsonl").read_text(encoding="utf-8") == content + "\n"


def test_a_calibration_text_that_is_no_text_any_more_is_no_error(
    run: Run, swept: list[object], small: list[object], tmp_path: Path
) -> None:
    gone = tmp_path / "gone.txt"
    gone.write_text(Path(str(small[small.index("--dataset") + 1])).read_text("utf-8"), encoding="utf-8")
    run("collect", *small, "--dataset", gone, "--save", "stats")
    gone.write_text("", encoding="utf-8")
    run(*swept, "--stats", "stats")


def test_table(run: Run, swept: list[object]) -> None:
    shown = run(*swept).stdout
    cells = {(c["method"], c["ratio"]): c["perplexity"] for c in lines()[1:]}
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert rows == [
        [method, "none", *(f"{cells[method, ratio]:.4f}" for ratio in (0.3, 0.6))]
        for method in ("magnitude", "neuronrank_wanda")
    ]
    assert f"unpruned: {lines()[0]['dense']['perplexity']:.4f}" in shown
    assert "2 windows of 32 tokens" in shown


def test_a_cell_that_fails_does_not_end_the_sweep(
    run: Run, swept: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = neuronrank_torch.runs.sweep.prune

    def fail(model: Any, tokenizer: Any, recipe: Recipe, *rest: Any, **options: Any) -> Any:
        if recipe.method == "magnitude" and recipe.sparsity_ratio == 0.6:
            raise NonFiniteError("NaN in layer 1")
        return prune(model, tokenizer, recipe, *rest, **options)

    monkeypatch.setattr(neuronrank_torch.runs.sweep, "prune", fail)
    shown = run(*swept)
    assert "Warning: magnitude none 0.6 failed: NaN in layer 1" in shown.stderr
    assert shown.stdout.count("failed") == 1


def test_no_figure_without_matplotlib_is_said(run: Run, swept: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuronrank_cli.commands.sweep, "find_spec", lambda name: None)
    shown = run(*swept, "--figure", "f.svg")
    assert "Warning: no figure is drawn without matplotlib: pip install matplotlib" in shown.stderr
    assert not Path("f.svg").exists()
    assert "f.svg" not in shown.stdout


def test_the_figure_shows_every_line(run: Run, swept: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of matplotlib, which need not be installed."""
    drawn: dict[str, Any] = {"lines": {}}

    class Axes:
        def plot(self, x: list[float], y: list[float], *, label: str, **_: Any) -> None:
            drawn["lines"][label] = (x, y)

        def axhline(self, y: float, **_: Any) -> None:
            drawn["dense"] = y

        def __getattr__(self, name: str) -> Any:
            return lambda *a, **k: drawn.update({name: a})

    class Figure:
        def __init__(self, **_: Any) -> None:
            self.subplots = Axes

        def savefig(self, path: Path, format: str) -> None:
            path.write_text(f"<{format}/>")

    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["matplotlib.figure"], "Figure", Figure, raising=False)
    monkeypatch.setattr(neuronrank_cli.commands.sweep, "find_spec", lambda name: True)
    shown = run(*swept, "--figure", "f.svg")
    assert Path("f.svg").read_text() == "<svg/>"
    assert shown.stdout.splitlines()[-1] == "figure: f.svg"
    cells = {(c["method"], c["ratio"]): c for c in lines()[1:]}
    for method in ("magnitude", "neuronrank_wanda"):
        own = [cells[method, ratio] for ratio in (0.3, 0.6)]
        assert drawn["lines"][method] == ([100 * c["share"] for c in own], [c["perplexity"] for c in own])
    assert drawn["dense"] == lines()[0]["dense"]["perplexity"]
    assert drawn["set_yscale"] == ("log",)


def test_matplotlib_draws_it(run: Run, swept: list[object]) -> None:
    pytest.importorskip("matplotlib")
    run(*swept, "--figure", "f.svg")
    assert "</svg>" in Path("f.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sparsity_type 2:4", "--sparsity_ratio is 0.6, allowed: 0.5 for 2:4"),
        ("--sparsity_type neurons --prune_method wanda", "--prune_method is 'wanda', allowed: with sparsity_type"),
        ("--sparsity_ratio 50", "--sparsity_ratio is 50"),
        ("--dataset self", "sweep cannot write its calibration text"),
        ("--stats gone", "gone is not a statistics folder"),
        ("--eval-dataset gone.txt", "file not found: gone.txt"),
        ("--out gone/cells.jsonl", "cannot write gone/cells.jsonl: there is no folder gone"),
        ("--out other.txt", "other.txt is not a file of cells"),
        ("--figure f.png", "--figure f.png is not the name of an .svg file"),
    ],
)
def test_wrong_input(run: Run, swept: list[object], arguments: str, message: str) -> None:
    Path("other.txt").write_text("a text\n")
    refused = run(*swept, *arguments.split(), code=2)
    assert refused.stdout == ""
    assert message in refused.stderr
    assert Path("other.txt").read_text() == "a text\n"


def test_cells_of_another_sweep_anywhere_in_the_file_are_refused(run: Run, swept: list[object], model: Path) -> None:
    run(*swept)
    copied = Path(shutil.copytree(model, "other"))
    weights = load_file(copied / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, copied / "model.safetensors", {"format": "pt"})
    other = [*swept[:1], "--model", copied, *swept[3:-1], "others.jsonl", "--sparsity_ratio", 0.1]
    run(*other)
    both = Path("cells.jsonl").read_text() + Path("others.jsonl").read_text()
    Path("cells.jsonl").write_text(both)
    assert "contains a different sweep: model" in run(*swept, "--sparsity_ratio", 0.1, code=2).stderr
    assert Path("cells.jsonl").read_text() == both


@pytest.mark.parametrize("reading_first", [False, True])
def test_methods_that_read_text_extend_a_sweep_of_others(run: Run, swept: list[object], reading_first: bool) -> None:
    head, tail = swept[:9], swept[13:]  # Between them are the two methods.
    alone = [[*head, "--prune_method", name, *tail] for name in ("magnitude", "neuronrank_wanda")]
    for flags in alone[:: -1 if reading_first else 1]:
        run(*flags)
    extended = json.loads(run(*swept, "--json").stdout)["cells"]
    assert len(lines()) == 5
    run(*swept, "--out", "whole.jsonl")
    whole = [json.loads(line) for line in Path("whole.jsonl").read_text().splitlines()]
    assert [cell["perplexity"] for cell in extended] == [line["perplexity"] for line in whole if "dense" not in line]
    # Another text is another sweep, but for what reads none.
    Path("another.txt").write_text("word " * 999)
    run(*alone[0], "--dataset", "another.txt")
    assert "calibration text was" in run(*alone[1], "--dataset", "another.txt", code=2).stderr


def test_methods_that_can_remove_neurons_by_default(run: Run, swept: list[object]) -> None:
    flags = [*swept[:9], *swept[13:], "--sparsity_type", "neurons"]
    cells = json.loads(run(*flags, "--json").stdout)["cells"]
    assert {cell["method"] for cell in cells} == {"neuronrank_wanda"}


def test_flags_without_effect_make_no_other_sweep(run: Run, swept: list[object], small: list[object]) -> None:
    run("collect", *small, "--save", "stats")
    run(*swept, "--stats", "stats")
    before = lines()
    assert "--nsamples has no effect" in run(*swept, "--stats", "stats", "--nsamples", 3).stderr
    assert lines() == before
    assert "layers" in run(*swept, "--pruning_last", 99, "--out", "last.jsonl").stderr


@pytest.mark.skipif(os.name != "posix", reason="Windows has no named pipes in folders")
def test_what_is_no_regular_file_is_not_replaced(run: Run, swept: list[object]) -> None:
    os.mkfifo("pipe")
    assert "pipe is not a regular file" in run(*swept, "--out", "pipe", code=2).stderr
    assert Path("pipe").is_fifo()


def test_a_sweep_of_failures_fails(run: Run, swept: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise NonFiniteError("NaN in the scores")

    monkeypatch.setattr(neuronrank_torch.runs.sweep, "prune", fails)
    assert "every cell failed; magnitude none 0.6 failed: NaN in the scores" in run(*swept, code=1).stderr


def test_a_damaged_cell_is_no_file_of_cells(run: Run, swept: list[object]) -> None:
    run(*swept)
    text = Path("cells.jsonl").read_text().replace('"share"', '"sharing"')
    Path("cells.jsonl").write_text(text)
    assert "cells.jsonl is not a file of cells" in run(*swept, code=2).stderr


def test_a_model_that_cannot_be_pruned_leaves_no_file(run: Run, swept: list[object], tmp_path: Path) -> None:
    swept[swept.index("--model") + 1] = write_model(tmp_path / "whole", tiny_type("zaya"))
    swept.remove("magnitude")  # It needs no text to run through the model.
    swept.remove("--prune_method")
    refused = run(*swept, code=2).stderr
    assert "ZayaModel passes more than hidden states from layer to layer" in refused
    assert "resume" not in refused
    assert not Path("cells.jsonl").exists()
