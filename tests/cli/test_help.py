"""The help: complete, in sections, with defaults, and there before torch is."""

from __future__ import annotations

import re
import subprocess
import sys

import click
import pytest
from command import Run

from neuronrank_cli.app import cli
from neuronrank_core import METHODS, PRESETS

SECTIONS = {
    "prune": [
        "Model",
        "What to prune",
        "Exponents of the score",
        "TF and IDF",
        "Factor of neuronrank_unstructured",
        "Calibration",
        "Perplexity and samples",
        "Output",
        "Methods (a, b, c, r: the exponents of weight, TF, IDF, spikiness)",
        "Effort",
        "Presets",
    ],
    "eval": ["Model", "Text", "Standard tasks", "Output"],
    "verify": ["Model", "Text", "Output"],
    "collect": ["Model", "Text", "Statistics", "Output"],
    "merge": ["Output"],
    "tune": ["Model", "Search", "What to prune", "Evaluation", "Test", "Output"],
    "sweep": ["Model", "What to sweep", "Calibration", "Evaluation", "Output"],
    "config": ["Output"],
    "report": ["Model", "Statistics", "Predictions", "Generated text", "Output"],
    "compare": ["Model", "Perplexity and speed", "Output"],
    "chat": ["Model", "Generated text", "Output"],
}


@pytest.mark.parametrize("command", cli.commands)
def test_every_flag_stands_once_under_a_heading(run: Run, command: str) -> None:
    shown = run(command, "--help").stdout
    assert re.findall(r"^(\S.*):$", shown, flags=re.MULTILINE) == SECTIONS[command]
    sections = shown[shown.index(f"\n{SECTIONS[command][0]}:") :]
    listed = re.findall(r"^  (?:-h, )?(--[\w-]+)(?: / (--[\w-]+))?", sections, flags=re.MULTILINE)
    declared = [flag for p in cli.commands[command].params if isinstance(p, click.Option) for flag in p.opts]
    assert sorted(flag for flag, _ in listed) == sorted([*declared, "--help"])
    assert max(map(len, shown.splitlines())) <= 80
    assert "\\b" not in shown
    assert not re.search(r"[\w-]-$", shown, flags=re.MULTILINE), "a line breaks within a word or a flag"
    assert run(command, "-h").stdout == shown


def test_the_list_of_commands_is_not_cut(run: Run) -> None:
    shown = run("--help").stdout
    assert max(map(len, shown.splitlines())) <= 80
    commands = re.findall(r"^  (\w+)  +(.*)$", shown.partition("Commands:")[2], flags=re.MULTILINE)
    assert [name for name, _ in commands] == sorted(cli.commands)
    assert all(text.endswith(".") and not text.endswith("...") for _, text in commands)


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("--prune_method", "neuronrank_wanda"),
        ("--sparsity_type", "unstructured"),
        ("--sparsity_ratio", "0.5, or N/M"),
        ("--pruning_last", "all layers"),
        ("--nr-tfidf-mode", "doc"),
        ("--nr-tfidf-k", "64"),
        ("--nr-q-active", "0.6"),
        ("--weight-exp", "1"),
        ("--tf-exp", "1; 0.5 for dass; 0.5 for neuronrank_wanda"),
        ("--idf-exp", "1; 0 for neuronrank_wanda; 0.5 for the experts of neuronrank_wanda"),
        ("--nr-spikiness-exp", "0"),
        ("--nsamples", "128"),
        ("--seed", "0"),
        ("--seqlen", "512"),
        ("--dataset", "builtin"),
    ],
)
def test_defaults_are_shown(run: Run, flag: str, default: str) -> None:
    shown = " ".join(run("prune", "--help").stdout.split())
    entry = re.search(rf" {flag} .*?\[default: ([^\]]*)\]", shown)
    assert entry is not None
    assert entry[1] == default


def test_methods_and_presets_are_explained(run: Run) -> None:
    shown = " ".join(run("prune", "--help").stdout.split())
    for method in METHODS.values():
        assert f"{method.name} {method.summary}" in shown
    for name in PRESETS:
        assert re.search(rf" {name} --idf-exp [\d.]+ --tf-exp [\d.]+ --weight-exp [\d.]+", shown)


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    code = """
import sys
from click.testing import CliRunner
from neuronrank_cli.app import cli
for arguments in (["--help"], ["--version"], ["prune", "--help"], ["eval", "--help"], ["verify", "--help"], ["prune"],
                  ["collect", "--help"], ["merge", "--help"], ["tune", "--help"], ["config", "--show", "prune"],
                  ["report", "--help"], ["compare", "--help"], ["chat", "--help"],
                  ["eval", "--model", "m", "--tasks", ","], ["prune", "--model", "m"],
                  ["prune", "--model", "m", "--save", "s", "--seed", "-1"], ["prune", "--bogus"]):
    CliRunner().invoke(cli, arguments)
print(sorted({"torch", "transformers", "datasets", "optuna"} & sys.modules.keys()))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout == "[]\n"
