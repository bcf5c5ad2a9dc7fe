"""The public names of neuronrank_torch: all there, typed, and none imported before it is used."""

from __future__ import annotations

import subprocess
import sys

import neuronrank_torch


def test_public_names_are_pinned_and_there() -> None:
    assert sorted(neuronrank_torch.__all__) == [
        "CompareJob",
        "Evaluation",
        "Job",
        "Perplexity",
        "Recipe",
        "Report",
        "StatisticsFolder",
        "TorchKernels",
        "TuneJob",
        "evaluate",
        "find_decoder",
        "launched",
        "load_model",
        "load_text",
        "open_model",
        "perplexity",
        "plan_prune",
        "prune",
        "run_collect",
        "run_compare",
        "run_eval",
        "run_merge",
        "run_prune",
        "run_tasks",
        "run_tune",
        "run_verify",
    ]
    for name in neuronrank_torch.__all__:
        assert getattr(neuronrank_torch, name).__module__.startswith("neuronrank_")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(neuronrank_torch, "nothing")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, neuronrank_torch; print({'torch', 'transformers', 'optuna'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
