"""The public names of neuronrank_torch: all there, typed, and none imported before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import neuronrank_torch


def test_every_public_name_is_there_and_typed() -> None:
    tree = ast.parse(Path(neuronrank_torch.__file__).read_text("utf-8"))
    [typed] = [n for n in tree.body if isinstance(n, ast.If)]
    for checkers in (neuronrank_torch.__all__, dir(neuronrank_torch), neuronrank_torch._HOME):
        assert sorted(checkers) == sorted(a.name for n in typed.body if isinstance(n, ast.ImportFrom) for a in n.names)
    for name in neuronrank_torch.__all__:
        assert getattr(neuronrank_torch, name).__module__.startswith("neuronrank_")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(neuronrank_torch, "nothing")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, neuronrank_torch; print({'torch', 'transformers', 'optuna'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
