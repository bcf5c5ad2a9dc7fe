"""Methods are found by being in their folder, each in a file of its name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import neuronrank_core
from neuronrank_core import METHODS, Method, Recipe
from neuronrank_core.recipe import MODES, Exponents
from neuronrank_core.statistics.table import INPUTS, SAMPLE, SIGNAL

FOLDER = Path(neuronrank_core.__file__).parent / "methods"

NEWCOMER = """
from neuronrank_core.methods.base import Method


class Newcomer(Method):
    name = "newcomer"
    summary = "keeps small weights"
    reads = frozenset({"q_active"})

    def score(self, module, context):
        return 1 / (1 + abs(context.weights[module]))

    def requires(self, recipe):
        return frozenset()


METHOD = Newcomer()
"""

TRY_IT = """
import numpy as np
from neuronrank_core import METHODS, Recipe, ScoringContext, prune_mask
from neuronrank_core.methods import requires, without_effect
assert "newcomer" in METHODS, list(METHODS)
recipe = Recipe(method="newcomer")
assert not requires(recipe) and without_effect(recipe, ["q_active", "tf_exp"]) == ["q_active", "tf_exp"]
print(prune_mask("gate_proj", ScoringContext(0, recipe, {"gate_proj": np.array([[1.0, -3.0], [2.0, -0.5]])})).tolist())
"""


def test_the_methods_of_the_specification_are_there() -> None:
    neuronrank = {f"neuronrank_{form}" for form in ("tfidf", "old", "unstructured", "wanda")}
    assert set(METHODS) >= {"magnitude", "wanda"} | neuronrank


def test_every_file_is_a_method_of_its_name() -> None:
    assert set(METHODS) == {path.stem for path in FOLDER.glob("*.py")} - {
        "__init__",
        "base",
        "context",
        "registry",
        "scoring",
    }
    for name, method in METHODS.items():
        assert method.name == name
        assert type(method).__module__ == f"neuronrank_core.methods.{name}"


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_declares_what_others_read_of_it(method: Method) -> None:
    assert method.summary
    assert "\n" not in method.summary
    assert method.beyond_mlp in METHODS
    assert method.mode in (None, *MODES)
    assert set(method.defaults) <= set(vars(Exponents()))
    assert method.reads <= set(vars(Recipe()))
    assert method.requires(Recipe(method=method.name)) <= {INPUTS, SIGNAL, SAMPLE}


def test_dropping_a_file_in_is_enough(tmp_path: Path) -> None:
    shutil.copytree(FOLDER.parent, tmp_path / "neuronrank_core", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "neuronrank_core" / "methods" / "newcomer.py").write_text(NEWCOMER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", TRY_IT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[[False, True], [True, False]]", done.stderr
