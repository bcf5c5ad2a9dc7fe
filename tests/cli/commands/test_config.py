"""Settings from a file: what beats what, what is refused, and what `neuronrank config` says of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import BashComplete
from command import Run
from flags import JOBS, PARAMETERS, RECIPE, RESULT

import neuronrank_torch.runs.prune
from neuronrank_cli.app import cli
from neuronrank_cli.config_file import keys
from neuronrank_core import Recipe
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.prune_result import PruneResult

BASE = ("--model", "m", "--save", "s")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def run_prune(job: Job, recipe: Recipe, *others: Any) -> PruneResult:
        seen.update(job=job, recipe=recipe, target=others[-1])
        return RESULT

    monkeypatch.setattr(neuronrank_torch.runs.prune, "run_prune", run_prune)
    return seen


def write(content: str) -> str:
    Path("run.toml").write_text(content)
    return "run.toml"


@pytest.mark.parametrize("name", [*RECIPE, *JOBS])
@pytest.mark.parametrize("underscores", [True, False])
def test_every_flag_can_stand_in_a_file(run: Run, asked: dict[str, Any], name: str, underscores: bool) -> None:
    value = RECIPE[name] if name in RECIPE else JOBS[name][0]
    key = PARAMETERS[name].opts[0].strip("-").replace("-", "_") if underscores else keys(PARAMETERS[name])[0]
    file = write(f"[prune]\n{key} = {json.dumps(value)}\n[eval]\nwindows = 1\n")
    drop = {"model": 0, "save": 2}.get(name)
    base = BASE if drop is None else (*BASE[:drop], *BASE[drop + 2 :])
    run("prune", *base, "--config", file, "--eval")
    if name in RECIPE:
        assert asked["recipe"] == Recipe(**{name: value})
    else:
        assert asked["job"] == JOBS[name][1]


@pytest.mark.parametrize("share", ["0.8", '"80%"'])
def test_a_share_may_be_a_number_or_a_percentage(run: Run, asked: dict[str, Any], share: str) -> None:
    run("prune", *BASE, "--config", write(f"[prune]\ntarget-params = {share}\n"))
    assert asked["target"].target_params == 0.8


def test_flags_beat_environment_beats_file_beats_preset_beats_default(run: Run, asked: dict[str, Any]) -> None:
    file = write(
        '[prune]\nprune_method = "neuronrank_tfidf"\npreset = "aggressive"\nidf-exp = 3\nseed = 3\nnsamples = 3\n'
    )
    env = {"NEURONRANK_PRUNE_SEED": "4", "NEURONRANK_PRUNE_NSAMPLES": "4"}
    flags = [*BASE, "--config", file, "--nsamples", 5]
    run("prune", *flags, env=env)
    expected = {"weight_exp": 0.5, "tf_exp": 1.0, "idf_exp": 3.0, "seed": 4, "nsamples": 5}
    assert asked["recipe"] == Recipe(method="neuronrank_tfidf", **expected)
    run("prune", *BASE, env={**env, "NEURONRANK_PRUNE_CONFIG": file})
    assert asked["recipe"].seed == 4
    assert asked["recipe"].idf_exp == 3.0
    shown = json.loads(run("config", "--show", "prune", *flags, "--json", env=env).stdout)
    settings = {name: (s["value"], s["source"], s["where"]) for name, s in shown.items()}
    section = f"{file}, [prune]"
    assert settings["--nsamples"] == (5, "flag", "")
    assert settings["--seed"] == (4, "environment", "NEURONRANK_PRUNE_SEED")
    assert settings["--idf-exp"] == (3.0, "file", section)
    assert settings["--weight-exp"] == (0.5, "preset", "aggressive")
    assert settings["--input-exp"] == (0.0, "default", "")
    assert settings["--sparsity_ratio"] == (0.5, "default", "")
    assert {*settings} == {p.opts[0] for p in PARAMETERS.values()}


@pytest.mark.parametrize("target", [("--target-params", "0.8"), ("--max-loss", "10%")])
def test_config_shows_what_a_target_sets(run: Run, target: tuple[str, str]) -> None:
    file = write("[prune]\nupdate = 'none'\n")
    for flags, update in (([], ["least-squares", "target"]), (["--config", file], ["none", "file"])):
        shown = json.loads(run("config", "--show", "prune", *target, *flags, "--json").stdout)
        assert [shown["--sparsity_type"][key] for key in ("value", "source")] == ["neurons", "target"]
        assert [shown["--update"][key] for key in ("value", "source")] == update


def test_config_says_what_an_unset_flag_stands_for(run: Run) -> None:
    shown = run("config", "--show", "tune").stdout
    assert re.search(r"--seqlen +- +default: as in the statistics", shown)
    assert "()" not in run("config", "--show", "sweep").stdout


def test_config_shows_every_command(run: Run) -> None:
    for name, command in cli.commands.items():
        if name == "config":
            continue
        shown = run("config", "--show", name).stdout
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name != "config":
                assert f" {parameter.opts[0]} " in shown
    file = write('[merge]\nfolders = ["a[0]", "b"]\n')
    shown = run("config", "--show", "merge", "--config", file).stdout
    assert " a[0], b " in shown
    assert "file run.toml, [merge]" in shown
    assert "is -1, allowed" in run("config", "--show", "prune", "--seed", "-1", code=2).stderr
    assert "'config' is not a command with settings" in run("config", "--show", "config", code=2).stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[prune]\nnsample = 3", "run.toml, [prune]: unknown key nsample; did you mean nsamples?"),
        ("[prune]\nconfig = 'x'", "run.toml, [prune]: unknown key config"),
        ("[prune]\nnsamples = '3'", 'run.toml, [prune]: nsamples is "3", allowed: a whole number'),
        ("[prune]\nnsamples = true", "run.toml, [prune]: nsamples is true, allowed: a whole number"),
        ("[prune]\nnsamples = 3.0", "run.toml, [prune]: nsamples is 3.0, allowed: a whole number"),
        ("[prune]\nidf-exp = '1'", 'run.toml, [prune]: idf-exp is "1", allowed: a number'),
        ("[prune]\neval = 1", "run.toml, [prune]: eval is 1, allowed: true or false"),
        ("[prune]\nprune_method = 1", "run.toml, [prune]: prune_method is 1, allowed: a string"),
        ("[prune]\nprune_method = 'nope'", "'--prune_method' (from run.toml, [prune]): 'nope' is not one of"),
        ("[prune]\nnr_q_active = 3", "--nr-q-active (from run.toml, [prune]) is 3.0, allowed: a number in (0, 1)"),
        ("[prune]\neval_windows = 0", "'--eval-windows' (from run.toml, [prune]): 0 is not in the range"),
        ("[prune]\nidf-exp = 1\nidf_exp = 2", "run.toml, [prune]: idf_exp is set twice"),
        ("[prun]\nseed = 1", "run.toml: [prun] is not a command; did you mean prune?"),
        ("seed = 1", "run.toml: seed is not in a section such as [prune]"),
        ("[prune", "run.toml: "),
    ],
)
def test_mistakes_in_a_file_are_found_there(run: Run, content: str, message: str) -> None:
    refused = run("prune", *BASE, "--config", write(content), code=2)
    assert message in refused.stderr
    assert refused.stdout == ""


def test_a_file_that_is_not_there(run: Run) -> None:
    assert "cannot read gone.toml: No such file" in run("prune", *BASE, "--config", "gone.toml", code=2).stderr


def test_shells_complete_commands_flags_and_names() -> None:
    def completed(words: str) -> list[str]:
        arguments = words.split(" ")[1:]
        complete = BashComplete(cli, {}, "neuronrank", "_NEURONRANK_COMPLETE")
        return [item.value for item in complete.get_completions(arguments[:-1], arguments[-1])]

    assert {"collect", "merge", "config"} <= {*completed("neuronrank ")}
    assert completed("neuronrank prune --nr-sp") == ["--nr-spikiness-exp"]
    assert "neuronrank_wanda" in completed("neuronrank prune --prune_method neuron")


def test_flags_that_can_be_repeated(run: Run) -> None:
    file = write("[sweep]\nsparsity_ratio = [0.5, 1]\nprune_method = ['wanda']\n[report]\nprompt = ['a b', 'c']\n")

    def value(command: str, flag: str, env: dict[str, str] | None = None) -> Any:
        given = [] if env else ["--config", file]
        return json.loads(run("config", "--show", command, *given, "--json", env=env).stdout)[flag]["value"]

    assert value("sweep", "--sparsity_ratio") == [0.5, 1.0]
    assert value("sweep", "--prune_method") == ["wanda"]
    assert value("report", "--prompt") == ["a b", "c"]
    variables = {"NEURONRANK_REPORT_PROMPT": "The capital of France\nis", "NEURONRANK_SWEEP_SPARSITY_RATIO": "0.1 0.2"}
    assert value("report", "--prompt", variables) == ["The capital of France", "is"]
    assert value("sweep", "--sparsity_ratio", variables) == [0.1, 0.2]
    file = write("[sweep]\nsparsity_ratio = ['0.5', '0.7']\n")
    assert value("sweep", "--sparsity_ratio") == [0.5, 0.7]
    wrong = write("[sweep]\nsparsity_ratio = [0.5, true]\n")
    assert "allowed: a list, each a number" in run("config", "--show", "sweep", "--config", wrong, code=2).stderr
