"""``neuronrank tune`` as a user meets it, on a tiny model."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from command import Run
from experts import FAMILIES
from optuna.storages import RDBStorage
from pruning import random_model
from tiny_files import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import neuronrank_torch.runs.prune
import neuronrank_torch.runs.tune.run
from neuronrank_cli.commands.tune import tune
from neuronrank_cli.config_file import tomllib
from neuronrank_core import InputError, Recipe
from neuronrank_core.methods import decided
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.tune.importance import importances
from neuronrank_torch.runs.tune.objective import MaskedModel
from neuronrank_torch.runs.tune.run import TuneJob
from neuronrank_torch.runs.tune.study import SeededByTrial, _located
from neuronrank_torch.text.sequences import evaluation_windows

TRIALS = 13
#: Flag to value, and what it changes: the job or the recipe.
FLAGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "--model": ("o", {"model": "o"}),
    "--device": ("cuda", {"device": "cuda"}),
    "--dtype": ("bfloat16", {"dtype": "bfloat16"}),
    "--stats": ("t", {"stats": "t"}),
    "--trials": (40, {"trials": 40}),
    "--prune_method": ("wanda", {"methods": ("wanda",)}),
    "--proxy": (True, {"proxy": True}),
    "--seed": (3, {"seed": 3}),
    "--storage": ("x.db", {"storage": "x.db"}),
    "--sparsity_type": ("2:4", {"sparsity_type": "2:4"}),
    "--sparsity_ratio": (0.6, {"sparsity_ratio": 0.6}),
    "--pruning_last": (2, {"pruning_last": 2}),
    "--nr-include-attention": (True, {"include_attention": True}),
    "--nr-prune-lm-head": (True, {"prune_lm_head": True}),
    "--eval-dataset": ("e", {"eval_dataset": "e"}),
    "--eval-windows": (3, {"eval_windows": 3}),
    "--seqlen": (64, {"seqlen": 64}),
    "--batch-size": (2, {"batch_size": 2}),
    "--test-dataset": ("t", {"test_dataset": "t"}),
    "--test-windows": (5, {"test_windows": 5}),
    "--force": (True, {"force": True}),
}


@pytest.fixture
def searched(run: Run, small: list[object], text: Path) -> list[object]:
    """Flags of a search that takes seconds, on a text other than the calibration text."""
    run("collect", *small, "--save", "stats")
    words = text.read_text(encoding="utf-8").split()
    Path("valid.txt").write_text(" ".join(reversed(words)), encoding="utf-8")
    base = ["tune", "--model", small[1], "--stats", "stats", "--trials", TRIALS, "--eval-dataset", "valid.txt"]
    return [*base, "--eval-windows", 2]


def trials(result: dict[str, Any]) -> list[tuple[Any, float]]:
    return [(one["recipe"], one["perplexity"]) for one in result["trials"]]


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_read(run: Run, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    assert {*FLAGS, "--json", "--config", "--save"} == {p.opts[0] for p in tune.params}
    seen: dict[str, Any] = {}

    def run_tune(job: TuneJob, recipe: Recipe, progress: Any) -> Any:
        assert callable(progress)
        seen.update({"recipe": recipe, "job": job})
        raise InputError("enough")

    monkeypatch.setattr(neuronrank_torch.runs.tune.run, "run_tune", run_tune)
    base = ["tune", "--model", "m", "--stats", "s", "--save", "best.toml"]
    run(*base, code=2)
    assert seen == {"recipe": Recipe(), "job": TuneJob("m", "s", "best.db")}
    value, changed = FLAGS[flag]
    run(*base, *([flag] if value is True else [flag, value]), code=2)
    job = {name: value for name, value in changed.items() if name in TuneJob.__dataclass_fields__}
    recipe = {name: value for name, value in changed.items() if name not in job}
    assert seen == {"recipe": Recipe(**recipe), "job": replace(TuneJob("m", "s", "best.db"), **job)}


def test_the_best_is_written_and_no_worse_than_what_it_started_from(
    run: Run, searched: list[object], small: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads(
        run(*searched, "--save", "best.toml", "--test-dataset", "builtin", "--test-windows", 1, "--json").stdout
    )
    assert len(result["trials"]) + result["given_up"] == TRIALS
    assert len({json.dumps(recipe) for recipe, _ in trials(result)}) == len(result["trials"])
    starts = [one for one in result["trials"] if one["start"]]
    assert {one["number"] for one in starts} == set(range(10))
    assert result["best"]["perplexity"] == min(value for _, value in trials(result))
    assert result["test"]["perplexity"].keys() == {"dense", "best", "wanda", "neuronrank_wanda"}
    assert sum(result["importance"].values()) == pytest.approx(1)
    # What a search says of a recipe is what pruning by it gives: the model was dense again before each trial.
    measured = ["--eval", "--eval-dataset", "valid.txt", "--eval-windows", 2, "--seqlen", 32, "--json"]
    for arguments, expected in (
        (["--config", "best.toml"], result["best"]["perplexity"]),
        (["--model", small[1], "--stats", "stats", "--prune_method", "wanda"], starts[0]["perplexity"]),
    ):
        report = json.loads(run("prune", *arguments, *measured).stdout)
        assert report["perplexity"]["after"]["perplexity"] == expected
    asked: list[Recipe] = []
    monkeypatch.setattr(
        neuronrank_torch.runs.prune,
        "run_prune",
        lambda job, recipe, *others: asked.append((job, recipe)) or 1 / 0,
    )
    run("prune", "--config", "best.toml", "--save", "out", code=1)
    ((job, recipe),) = asked
    assert job == Job(str(small[1]), stats="stats", save="out")
    fitted = StatisticsFolder("stats").fitted(recipe)
    assert asdict(decided(fitted)) == result["best"]["recipe"]


def test_the_file_says_what_it_is_and_what_was_measured(run: Run, searched: list[object]) -> None:
    result = json.loads(
        run(*searched, "--save", "best.toml", "--test-dataset", "builtin", "--test-windows", 2, "--json").stdout
    )
    written = Path("best.toml").read_text()
    assert {"prune_method", "sparsity_type", "sparsity_ratio"} <= set(tomllib.loads(written)["prune"])
    assert "nr-tfidf-mode" in written
    comments = "".join(line for line in written.splitlines(keepends=True) if line.startswith("#"))
    starts = {one["start"]: one["perplexity"] for one in result["trials"]}
    figures = [result["dense"], result["best"]["perplexity"], starts["wanda"], starts["neuronrank_wanda"]]
    for figure in [*figures, *result["test"]["perplexity"].values()]:
        assert f"{figure:.4f}" in comments
    assert "valid.txt, 2 windows of 32 tokens" in comments
    # Nothing in the file is without effect.
    assert "has no effect" not in run("prune", "--config", "best.toml", "--dry-run").stderr


def test_standard_errors_are_those_of_paired_differences(run: Run, searched: list[object], small: list[object]) -> None:
    result = json.loads(run(*searched, "--eval-windows", 5, "--save", "best.toml", "--json").stdout)
    run("prune", "--config", "best.toml", "--save", "best")
    # By hand, from two saved models.
    for trial in result["trials"][:2]:
        run(
            "prune", "--model", small[1], "--stats", "stats", "--prune_method", trial["start"], "--save", trial["start"]
        )
        nll = []
        for name in (trial["start"], "best"):
            pruned, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
            text = Path("valid.txt").read_text(encoding="utf-8")
            windows = evaluation_windows(tokenizer, text, seqlen=32, windows=5, bos_mode="window")
            with torch.no_grad():
                ids = [torch.from_numpy(window[None]) for window in windows]
                nll.append(np.array([float(pruned(input_ids=one, labels=one).loss) for one in ids]))
        slopes = np.exp(nll[0].mean()) * nll[0] - np.exp(nll[1].mean()) * nll[1]
        assert trial["standard_error"] == pytest.approx(slopes.std(ddof=1) / 5**0.5, rel=1e-3, abs=1e-3)
    assert result["best"]["standard_error"] == 0


def test_what_the_windows_do_not_tell_from_the_best_is_noise(
    run: Run, searched: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The unpruned model, Wanda, the default; then recipes that are worse by as much in every window.
    given = iter([[90.0, 110.0, 100.0], [100.0, 120.0, 110.0], [101.0, 119.0, 110.5]])
    monkeypatch.setattr(MaskedModel, "nll", lambda *_: next(given, [105.0, 125.5, 115.0]))
    asked = [*searched, "--eval-windows", 3]
    result = json.loads(run(*asked, "--save", "best.toml", "--json").stdout)
    assert (result["best"]["number"], result["within_noise"]) == (0, [1])
    line = "3 windows): 1 of 12 other recipes, among them neuronrank_wanda"
    assert line in run(*asked, "--save", "best.toml", "--force").stdout
    assert line in Path("best.toml").read_text()


def test_one_window_tells_nothing(run: Run, searched: list[object]) -> None:
    asked = [*searched, "--eval-windows", 1, "--save", "best.toml"]
    result = json.loads(run(*asked, "--json").stdout)
    assert result["within_noise"] == []
    assert {one["standard_error"] for one in result["trials"]} == {None}
    assert "A single window cannot tell noise from a difference." in run(*asked, "--force").stdout


def test_help_names_the_lowest_number_of_trials(run: Run) -> None:
    assert "x>=10 with the default methods" in " ".join(run("tune", "--help").stdout.split())


def test_same_seed_same_trials_and_a_search_that_was_cut_off_goes_on(
    run: Run, searched: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.loads(run(*searched, "--save", "whole.toml", "--json").stdout)
    other = json.loads(run(*searched, "--save", "other.toml", "--seed", 1, "--json").stdout)
    assert trials(other)[10:] != trials(whole)[10:]
    measure, calls = MaskedModel.nll, []
    for stop in (4, 12):  # Among the starting points, and later. The first call is of the dense model.

        def cut_off(self: MaskedModel, *arguments: Any, stop: int = stop) -> Any:
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return measure(self, *arguments)

        monkeypatch.setattr(MaskedModel, "nll", cut_off)
        stopped = run(*searched, "--save", "again.toml", code=130)
        assert "trials are finished and kept; rerun the same command to resume" in stopped.stderr
        assert not Path("again.toml").exists()
    monkeypatch.setattr(MaskedModel, "nll", measure)
    again = json.loads(run(*searched, "--save", "again.toml", "--json").stdout)
    assert trials(again) == trials(whole)
    assert again["best"]["recipe"] == whole["best"]["recipe"]


def test_a_killed_process_is_taken_over(run: Run, searched: list[object], tmp_path: Path) -> None:
    flags = [str(one) for one in searched]
    command = [sys.executable, "-m", "neuronrank_cli", *flags, "--save", "best.toml"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=dict(os.environ))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("trial 5"):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    result = json.loads(run(*searched, "--save", "best.toml", "--json").stdout)
    assert len(result["trials"]) == TRIALS
    assert sum(one["start"] is not None for one in result["trials"]) == 10
    assert len({json.dumps(recipe) for recipe, _ in trials(result)}) == TRIALS


def test_any_seed_of_the_other_commands_will_do() -> None:
    drawn = []
    for seed in (10**20, 10**20 + 1):
        study = optuna.create_study(sampler=SeededByTrial(seed))
        drawn.append(study.ask().suggest_float("x", 0, 1))
    assert drawn[0] != drawn[1]


def test_several_processes_share_a_search(searched: list[object], tmp_path: Path) -> None:
    flags = [*map(str, searched), "--storage", "shared.db", "--json"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "neuronrank_cli", *flags, "--save", f"best-{number}.toml"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for number in range(2)
    ]
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "".join(errors for _, errors in ended)
    # One that ends while others are still at work does not know what they find.
    last = max((json.loads(output) for output, _ in ended), key=lambda result: len(result["trials"]))
    assert sum(one["start"] is not None for one in last["trials"]) == 10
    assert len({json.dumps(recipe) for recipe, _ in trials(last)}) == len(last["trials"]) == TRIALS


def test_another_search_is_refused_and_nothing_is_replaced_unasked(run: Run, searched: list[object]) -> None:
    first = json.loads(run(*searched, "--save", "best.toml", "--json").stdout)
    refused = run(*searched, "--save", "best.toml", code=2)
    assert "best.toml already exists" in refused.stderr
    more = ["--save", "best.toml", "--force", "--json", "--trials", TRIALS + 1]
    longer = json.loads(run(*searched, *more).stdout)
    assert trials(longer)[:TRIALS] == trials(first)
    assert len(longer["trials"]) == TRIALS + 1
    refused = run(*searched, "--storage", "best.db", "--save", "b.toml", "--sparsity_ratio", 0.3, code=2)
    assert "best.db contains a different search: recipe sparsity_ratio was 0.5, is 0.3" in refused.stderr
    anew = [*searched, "--storage", "best.db", "--save", "b.toml", "--sparsity_ratio", 0.3, "--force", "--json"]
    assert trials(json.loads(run(*anew).stdout)) != trials(first)


def test_proxy_gives_up_what_is_hopeless_but_no_starting_point(run: Run, searched: list[object]) -> None:
    result = json.loads(run(*searched, "--save", "best.toml", "--proxy", "--json").stdout)
    assert sum(one["start"] is not None for one in result["trials"]) == 10
    assert len(result["trials"]) + result["given_up"] == TRIALS


def test_equal_results_make_no_setting_important() -> None:
    recipes = [Recipe(tf_exp=exponent / 10) for exponent in range(5)]
    assert importances([(recipe, 5.0) for recipe in recipes]) == {}
    assert importances([(recipe, 5.0 + recipe.tf_exp) for recipe in recipes]) == {"tf_exp": 1.0}


def test_removed_experts_are_there_again_before_the_next_trial(
    run: Run, searched: list[object], text: Path, tmp_path: Path
) -> None:
    mixture = write_model(tmp_path / "mixture", random_model(copy.deepcopy(FAMILIES["qwen3_moe"][0])))
    run("collect", "--model", mixture, "--dataset", text, "--nsamples", 4, "--seqlen", 32, "--save", "mixed")
    searched[searched.index("--model") + 1] = mixture
    searched[searched.index("--stats") + 1] = "mixed"
    removed = ["--sparsity_type", "experts", "--sparsity_ratio", 0.5]
    tested = ["--test-dataset", "valid.txt", "--test-windows", 2]
    shown = run(*searched, *removed, "--proxy", "--save", "shown.toml", *tested).stdout
    assert "test, best compared with reap: " in shown
    assert "test, best compared with neuronrank_wanda: " in shown
    result = json.loads(run(*searched, *removed, "--proxy", "--save", "best.toml", "--json").stdout)
    assert len(result["trials"]) + result["given_up"] == TRIALS
    starts = {one["start"]: one["perplexity"] for one in result["trials"]}
    assert result["best"]["perplexity"] == min(one["perplexity"] for one in result["trials"])
    measured = ["--eval", "--eval-dataset", "valid.txt", "--eval-windows", 2, "--seqlen", 32, "--json"]
    for arguments, expected in (
        (["--config", "best.toml"], result["best"]["perplexity"]),
        *(
            (["--model", mixture, "--stats", "mixed", "--prune_method", method, *removed], starts[method])
            for method in ("reap", "neuronrank_wanda")
        ),
    ):
        report = json.loads(run("prune", *arguments, *measured).stdout)
        assert report["perplexity"]["after"]["perplexity"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("file", ["a?b/c d.db", "br{x}#.db", "per%41.db"])
def test_trials_are_kept_where_they_should_be(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    RDBStorage(_located(str(tmp_path / file))[0])
    assert (tmp_path / file).read_bytes().startswith(b"SQLite format 3")


def test_tables_and_warnings(run: Run, searched: list[object], text: Path) -> None:
    at = searched.index("valid.txt")
    shown = run(*searched[:at], text, *searched[at + 1 :], "--save", "best.toml")
    assert "Warning: the evaluation text is the calibration text" in shown.stderr
    assert "the test text" not in shown.stderr
    assert "--allocate neuronrank was not tried" not in shown.stderr
    assert "documented rank" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "saved to: best.toml"
    assert "[prune]" in Path("best.toml").read_text().splitlines()


def test_a_used_test_text_and_ratios_that_are_not_tried_are_named(
    run: Run, small: list[object], searched: list[object], text: Path
) -> None:
    run("collect", *small, "--batch-size", 1, "--documents", "1:4", "--save", "part")
    searched[searched.index("--stats") + 1] = "part"
    shown = run(*searched, "--save", "best.toml", "--test-dataset", text, "--test-windows", 1)
    assert "Warning: the test text shares passages with the calibration text" in shown.stderr
    assert shown.stderr.count("the test text shares") == 1
    assert (
        "Warning: --allocate neuronrank was not tried, because the statistics have no gains of errors" in shown.stderr
    )
    assert "allocate neuronrank" not in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--trials 9", "--trials is 9, allowed: at least 10, the recipes to start from"),
        ("--sparsity_type neurons", "--sparsity_type is 'neurons', allowed: unstructured, N:M or experts"),
        ("--storage gone/x.db", "cannot keep trials in gone/x.db"),
        ("--save gone/best.toml", "cannot write gone/best.toml: there is no folder gone"),
        ("--save best", "--save best is not the name of a .toml file"),
        ("--stats gone", "gone is not a statistics folder"),
        ("--eval-dataset gone.txt", "file not found: gone.txt"),
    ],
)
def test_wrong_input(run: Run, searched: list[object], arguments: str, message: str) -> None:
    refused = run(*searched, "--save", "best.toml", *arguments.split(), code=2)
    assert refused.stdout == ""
    assert message in refused.stderr
    assert not Path("best.toml").exists()


def test_without_optuna(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    refused = run("tune", "--model", "m", "--stats", "s", "--save", "best.toml", code=2)
    assert refused.stderr == "Error: tuning needs the package optuna\nHint: pip install 'neuronrank[tune]'\n"


def test_trials_of_a_study_are_those_of_optuna(run: Run, searched: list[object]) -> None:
    """The database is an ordinary one, for Optuna's own tools."""
    run(*searched, "--save", "best.toml")
    study = optuna.load_study(study_name="neuronrank", storage="sqlite:///best.db")
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == TRIALS
