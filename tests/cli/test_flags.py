"""Every flag does something, and what its name says; every field of a recipe has one."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from command import Run
from flags import BASE, JOB, JOBS, PARAMETERS, RECIPE, RESULT
from pruning import random_model
from tiny import VOCAB
from tiny_files import write_model
from transformers import Llama4TextConfig

import neuronrank_torch.runs.dry_run
import neuronrank_torch.runs.evaluate
import neuronrank_torch.runs.plan_smaller  # Before the stub of `plan_prune`, which it would keep for other tests.
import neuronrank_torch.runs.prune
from neuronrank_cli.commands.evaluate import evaluate
from neuronrank_cli.options import SPELLING
from neuronrank_core import METHODS, Recipe
from neuronrank_core.effort import candidates
from neuronrank_core.mixes import Target
from neuronrank_torch.runs.evaluate import EvalResult
from neuronrank_torch.runs.job import Evaluation, Job
from neuronrank_torch.runs.prune_result import Plan, PruneResult
from neuronrank_torch.schema import to_json

#: Those that this file tests by what they print or call.
ACTIONS = {"evaluate", "dry_run", "as_json", "preset", "effort", "verbose", "push_to_hub", "target_params", "max_loss"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the commands asked for, instead of doing it."""
    seen: dict[str, Any] = {}

    def run_prune(
        job: Job, recipe: Recipe, progress: Any, candidates: Any, warn: Any, command: str, target: Target | None
    ) -> PruneResult:
        assert callable(progress)
        assert callable(warn)
        assert command.startswith("neuronrank prune --model ")
        seen.update(job=job, recipe=recipe, planned=False, candidates=candidates, target=target)
        return RESULT

    def plan_prune(job: Job, recipe: Recipe, efforts: Any, **_: bool) -> PruneResult:
        seen.update(job=job, recipe=recipe, planned=True, candidates={}, efforts=efforts, target=None)
        seconds = {name: 1.0 + number for number, name in enumerate(efforts)}
        return replace(RESULT, plan=Plan(1 << 20, {"layers": 1 << 31, "update": 0}, 90.0, seconds))

    def run_eval(model: str, evaluation: Evaluation, **others: Any) -> EvalResult:
        others.pop("progress")
        seen.update(model=model, evaluation=evaluation, **others)
        return EvalResult(2.0, 0.6, 31, 1, 32, None, model=model, dataset=evaluation.dataset)

    monkeypatch.setattr(neuronrank_torch.runs.prune, "run_prune", run_prune)
    monkeypatch.setattr(neuronrank_torch.runs.evaluate, "run_eval", run_eval)
    monkeypatch.setattr(neuronrank_torch.runs.dry_run, "plan_prune", plan_prune)
    return seen


def spelled(name: str, value: Any) -> list[Any]:
    flag = PARAMETERS[name].opts[0]
    return [flag] if value is True else [flag, value]


def test_every_field_has_a_flag_and_every_flag_is_under_test() -> None:
    assert set(RECIPE) == set(SPELLING) == {f.name for f in fields(Recipe)}
    assert set(PARAMETERS) == {*RECIPE, *JOBS, *ACTIONS}
    assert {f.name for f in fields(Job)} == (JOBS.keys() - {"eval_dataset", "eval_windows"}) | {"evaluation"}


def test_without_flags_the_defaults_hold(run: Run, asked: dict[str, Any]) -> None:
    run("prune", *BASE)
    assert asked == {"job": JOB, "recipe": Recipe(), "planned": False, "candidates": {}, "target": None}


@pytest.mark.parametrize("name", RECIPE)
def test_a_flag_of_the_recipe_sets_its_field(run: Run, asked: dict[str, Any], name: str) -> None:
    run("prune", *BASE, *spelled(name, RECIPE[name]))
    assert RECIPE[name] != getattr(Recipe(), name)
    assert asked["recipe"] == Recipe(**{name: RECIPE[name]})
    shared = {key: RECIPE[key] for key in {name} & {"seqlen", "bos"}}
    assert asked["job"] == replace(JOB, evaluation=Evaluation(**shared))


@pytest.mark.parametrize("name", JOBS)
def test_a_flag_of_the_job_sets_its_field(run: Run, asked: dict[str, Any], name: str) -> None:
    value, job = JOBS[name]
    run("prune", *BASE, *spelled(name, value))
    assert asked["job"] == job != JOB
    assert asked["recipe"] == Recipe()


def test_actions(run: Run, asked: dict[str, Any]) -> None:
    assert json.loads(run("prune", *BASE, "--json").stdout) == to_json(RESULT)
    run("prune", "--model", "m", "--save", "s")
    assert asked["job"].evaluation is None
    shown = run("prune", "--model", "m", "--dry-run").stdout.splitlines()
    assert asked["planned"]
    assert shown[-4:-1] == [
        "size of a layer: 1 MiB",
        "peak memory: about 2.0 GiB: layers 2.0 GiB",
        "time: about 90 s, extrapolated from the first layer",
    ]
    run("prune", *BASE, "--nr-include-attention", "--nr-skip-attention")
    assert asked["recipe"] == Recipe()


@pytest.mark.parametrize("name", [*RECIPE, *JOBS])
@pytest.mark.parametrize(("old", "new"), ["-_", "_-"])
def test_dashes_and_underscores_are_interchangeable(
    run: Run, asked: dict[str, Any], name: str, old: str, new: str
) -> None:
    value = RECIPE[name] if name in RECIPE else JOBS[name][0]
    flag, *rest = spelled(name, value)
    run("prune", *BASE, "--" + flag[2:].replace(old, new), *rest)
    assert asked["job"] != JOB or asked["recipe"] != Recipe()


@pytest.mark.parametrize("name", METHODS)
def test_so_they_are_in_the_names_of_methods(run: Run, asked: dict[str, Any], name: str) -> None:
    run("prune", *BASE, "--prune-method", name.replace("_", "-"))
    assert asked["recipe"].method == name


@pytest.mark.parametrize("name", [*RECIPE, *JOBS])
def test_the_environment_sets_every_flag_by_its_own_name(run: Run, asked: dict[str, Any], name: str) -> None:
    value, job = JOBS.get(name, (None, None))
    value = RECIPE.get(name, value)
    variable = "NEURONRANK_PRUNE_" + PARAMETERS[name].opts[0].strip("-").replace("-", "_").upper()
    drop = {"model": "--model", "save": "--save"}.get(name)
    base = [a for a in BASE if a != drop and not (drop and a == BASE[BASE.index(drop) + 1])]
    run("prune", *base, env={variable: str(value)})
    if job is None:
        assert getattr(asked["recipe"], name) == value
    else:
        assert asked["job"] == job


def test_a_wrong_value_in_the_environment_is_found_there(run: Run) -> None:
    result = run("prune", *BASE, env={"NEURONRANK_PRUNE_NR_TFIDF_K": "many"}, code=2)
    assert "'--nr-tfidf-k' (from NEURONRANK_PRUNE_NR_TFIDF_K): 'many' is not a valid integer" in result.stderr
    assert "from NEURONRANK" not in run("prune", *BASE, "--nr-tfidf-k", "many", code=2).stderr


def test_what_beats_what(run: Run, asked: dict[str, Any]) -> None:
    env = {"NEURONRANK_PRUNE_PRESET": "aggressive", "NEURONRANK_PRUNE_IDF_EXP": "3"}
    run("prune", *BASE, "--preset", "aggressive")
    assert asked["recipe"] == Recipe(idf_exp=2.5, tf_exp=1.0, weight_exp=0.5)
    run("prune", *BASE, env=env)
    assert asked["recipe"] == Recipe(idf_exp=3.0, tf_exp=1.0, weight_exp=0.5)
    run("prune", *BASE, "--idf_exp", 4, "--weight-exp", 1.0, env=env)
    assert asked["recipe"] == Recipe(idf_exp=4.0, tf_exp=1.0, weight_exp=1.0)
    run("prune", *BASE, "--preset", "conservative", env=env)
    assert asked["recipe"] == Recipe(idf_exp=3.0, tf_exp=1.5, weight_exp=1.0)
    run("prune", *BASE, env={"NEURONRANK_PRUNE_IDF_EXP": ""})
    assert asked["recipe"] == Recipe()


def test_effort_sets_what_the_user_did_not(run: Run, asked: dict[str, Any]) -> None:
    for effort, update in (("fast", "none"), ("good", "gradual"), ("best", "gradual")):
        run("prune", *BASE, "--effort", effort)
        assert asked["recipe"] == Recipe(update=update)
        assert bool(asked["candidates"]) == (effort == "best")
    run("prune", *BASE, "--effort", "good", "--sparsity_type", "neurons")
    assert asked["recipe"] == Recipe(update="least-squares", sparsity_type="neurons")
    run("prune", *BASE, "--effort", "best", "--update", "least-squares", "--allocate", "uniform")
    assert asked["recipe"] == Recipe(update="least-squares")
    assert {recipe.allocate for recipe in asked["candidates"].values()} <= {"uniform"}


@pytest.mark.parametrize(
    ("flag", "target"),
    [
        (["--target-params", 0.8], Target(target_params=0.8)),
        (["--target-params", "80%"], Target(target_params=0.8)),
        (["--max-loss", "10%"], Target(max_loss=0.1)),
        (["--max-loss", 0], Target(max_loss=0.0)),
    ],
)
def test_a_target_implies_removal_with_refit(run: Run, asked: dict[str, Any], flag: list[Any], target: Target) -> None:
    run("prune", *BASE, *flag)
    assert asked["target"] == target
    assert asked["recipe"] == Recipe(sparsity_type="neurons", update="least-squares")
    chosen = run("prune", *BASE, *flag, "--update", "none", "--divisible-by", 2, "--multiple-of", 16)
    assert asked["recipe"] == Recipe(sparsity_type="neurons", divisible_by=2, multiple_of=16)
    assert chosen.stderr == ""


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-params", 0.8, "--sparsity_type", "neurons"], "leave out --sparsity_type"),
        (["--max-loss", 0.1, "--sparsity_ratio", 0.2, "--stats", "s"], "leave out --sparsity_ratio, --stats"),
        (["--target-params", 0.8, "--max-loss", 0.1], "--target-params chooses what to remove: leave out --max-loss"),
        (["--target-params", 0.8, "--effort", "best"], "leave out --effort"),
        (["--target-params", 80], "--target-params is 80.0, allowed: a number in (0, 1)"),
        (["--target-params", 1], "--target-params is 1.0"),
        (["--max-loss", "-1%"], "--max-loss is -0.01"),
        (["--max-loss", "much"], "'much' is not a number, such as 0.1 or 10%."),
        (["--target-params", 0.8, "--nr-prune-lm-head"], "prune"),
    ],
)
def test_what_a_target_does_not_go_with(run: Run, arguments: list[Any], message: str) -> None:
    assert message in run("prune", *BASE, *arguments, code=2).stderr


def test_effort_in_a_dry_run_names_the_time_of_each(run: Run, asked: dict[str, Any]) -> None:
    for effort, time in (("fast", "1 s"), ("good", "2 s"), ("best", "3 s")):
        said = run("prune", *BASE, "--dry-run", "--effort", effort).stdout
        assert [*asked["efforts"]] == ["fast", "good", "best"]
        assert f"time: about {time}, extrapolated" in said
        assert "by effort: fast 1 s, good 2 s, best 3 s" in said
    run("prune", *BASE, "--dry-run", "--effort", "fast", "--stats", "s")
    assert not asked["efforts"]
    run("prune", *BASE, "--dry-run")
    assert not asked["efforts"]


def test_effort_needs_text_except_for_one_pass(run: Run, asked: dict[str, Any]) -> None:
    for effort in ("good", "best"):
        said = run("prune", *BASE, "--effort", effort, "--stats", "s", code=2).stderr
        assert f"--effort {effort} needs a calibration text" in said
    run("prune", *BASE, "--effort", "fast", "--stats", "s")
    assert (asked["recipe"], asked["job"].stats) == (Recipe(), "s")


def test_refusals_speak_of_effort_where_it_was_set(run: Run, text: Path, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4}
    own = {"num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "head_dim": 8}
    config = Llama4TextConfig(**sizes, **own, num_key_value_heads=2, vocab_size=VOCAB, pad_token_id=None)
    mixture = write_model(tmp_path / "m", random_model(config))
    base = ["prune", "--model", mixture, "--dataset", text, "--nsamples", 2, "--seqlen", 32, "--dry-run"]
    for flags, named in (
        (["--effort", "good"], "--effort good"),
        (["--effort", "best"], "--effort best"),
        (["--effort", "good", "--update", "gradual"], "--update gradual"),
        (["--update", "gradual"], "--update gradual"),
    ):
        said = run(*base, *flags, code=2).stderr
        assert f"Error: {named} cannot be used on Llama4TextExperts, which multiplies" in said
        assert "Hint: leave it out" in said


@pytest.mark.usefixtures("asked")
def test_effort_without_effect_is_said(run: Run) -> None:
    said = run("prune", *BASE, "--effort", "good", "--update", "none").stderr
    assert "--effort has no effect with --update" in said
    said = run("prune", *BASE, "--effort", "best", "--allocate", "uniform").stderr
    assert ("--effort best is the same as good here" in said) == (len(candidates(Recipe(), {"allocate"})) == 1)


def test_flags_of_eval(run: Run, asked: dict[str, Any]) -> None:
    base = {"model": "m", "reference": None, "device": "auto", "dtype": "auto", "batch_size": 1}
    run("eval", "--model", "m")
    assert asked == {**base, "evaluation": Evaluation()}
    cases = {
        "model": ("o", {"model": "o"}),
        "reference": ("r", {"reference": "r"}),
        "device": ("cuda", {"device": "cuda"}),
        "dtype": ("float16", {"dtype": "float16"}),
        "batch_size": (3, {"batch_size": 3}),
        "dataset": ("d", {"evaluation": Evaluation("d")}),
        "windows": (5, {"evaluation": Evaluation(windows=5)}),
        "seqlen": (40, {"evaluation": Evaluation(seqlen=40)}),
        "bos": ("text", {"evaluation": Evaluation(bos="text")}),
    }
    of_tasks = {"tasks", "include_path", "fewshot", "limit"}  # In test_tasks.py.
    assert {*cases, *of_tasks, "as_json", "config"} == {p.name for p in evaluate.params}
    for name, (value, changed) in cases.items():
        expected = {**base, "evaluation": Evaluation(), **changed}
        run("eval", "--model", "m", "--" + name.replace("_", "-"), value)
        assert asked == expected
        run("eval", *(() if name == "model" else ("--model", "m")), env={f"NEURONRANK_EVAL_{name.upper()}": str(value)})
        assert asked == expected


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("arguments", "warnings"),
    [
        ("--prune_method neuronrank_tfidf --idf-exp 2 --nr-q-active 0.5 --preset balanced", []),
        ("--prune_method neuronrank_tfidf --nr-tfidf-mode topic --nr-tfidf-k 5 --seed 1", []),
        ("--prune_method wanda --idf-exp 2", ["--idf-exp has no effect on wanda"]),
        ("--prune_method wanda --preset balanced", ["--preset has no effect on wanda"]),
        (
            "--prune_method neuronrank_tfidf --nr-tfidf-k 5",
            ["--nr-tfidf-k has no effect on neuronrank_tfidf in doc mode"],
        ),
        (
            "--nr-tfidf-mode topic",
            [
                "--nr-tfidf-mode has no effect on neuronrank_wanda without IDF: "
                "set --idf-exp 0.5 too, or use --prune_method neuronrank_tfidf"
            ],
        ),
        ("--nr-tfidf-mode topic --idf-exp 0.5", []),
        ("--nr-tfidf-mode topic --prune_method neuronrank_tfidf", []),
        ("--nr-tfidf-mode topic --prune_method wanda", ["--nr-tfidf-mode has no effect on wanda"]),
        ("--idf-exp 0 --nr-q-active 0.7", ["on neuronrank_wanda in doc mode with --idf-exp 0"]),
        ("--sparsity_type 2:4 --compare row", ["--compare has no effect on 2:4"]),
        ("--update-iterations 8", ["--update-iterations has no effect on a run without --update"]),
        ("--update-iterations 8 --update gradual", []),
        ("--update-target model", ["--update-target has no effect on a run without --update"]),
        ("--update-target model --update gradual", []),
        (
            "--update-iterations 8 --sparsity_type neurons --update least-squares",
            ["--update-iterations has no effect on neurons"],
        ),
        (
            "--prune_method magnitude --dataset x --bos text",
            [
                "--bos has no effect on magnitude, which needs no text",
                "--dataset has no effect on magnitude, which needs no text",
            ],
        ),
        ("--prune_method magnitude --seqlen 64 --batch-size 2 --eval", []),
        (
            "--prune_method magnitude --seed 1 --stats s",
            [
                "--seed has no effect on magnitude, which needs no text",
                "--stats has no effect on magnitude, which needs no text",
            ],
        ),
        (
            "--stats s --dataset d --nsamples 3 --seqlen 9 --seed 1 --propagate pruned --hidden-states disk",
            [
                f"--{name} has no effect with --stats"
                for name in ("dataset", "hidden-states", "nsamples", "propagate", "seed", "seqlen")
            ],
        ),
        ("--stats s --seqlen 9 --bos text --batch-size 2 --eval", []),
        (
            "--sparsity_type layers --hidden-states disk",
            ["--hidden-states has no effect where the whole model is in memory"],
        ),
        (
            "--target-params 0.8 --hidden-states disk",
            ["--hidden-states has no effect where the whole model is in memory"],
        ),
        ("--stats s --prune_method neuronrank_tfidf --nr-tfidf-mode topic --seed 1 --nr-q-active 0.7", []),
        ("--eval-windows 3", ["--eval-windows has no effect without --eval"]),
        ("--eval-windows 3 --eval", []),
        ("--dry-run --force --save s", []),
        (
            "--sparsity_type experts --nr-tfidf-mode doc --nr-signal product",
            [
                f"--nr-{name} has no effect on the experts of neuronrank_wanda: use --prune_method neuronrank_tfidf"
                for name in ("signal", "tfidf-mode")
            ],
        ),
        ("--sparsity_type experts --nr-tfidf-k 8 --idf-exp 2", []),
    ],
)
def test_flags_without_effect_are_named(run: Run, arguments: str, warnings: list[str]) -> None:
    lines = run("prune", "--model", "m", "--save", "s", *arguments.split()).stderr.splitlines()
    assert len(lines) == len(warnings)
    for line, expected in zip(lines, warnings, strict=True):
        assert line.startswith("Warning: --")
        assert line.endswith(expected)


@pytest.mark.usefixtures("asked")
def test_force_without_save_has_no_effect(run: Run) -> None:
    assert "Warning: --force has no effect without --save" in run("prune", "--model", "m", "--eval", "--force").stderr


@pytest.mark.usefixtures("asked")
def test_warnings_hear_the_environment_too(run: Run) -> None:
    result = run("prune", *BASE, "--prune_method", "wanda", env={"NEURONRANK_PRUNE_TF_EXP": "2"})
    assert result.stderr == "Warning: --tf-exp has no effect on wanda\n"
