"""The table in docs/faults.md names tests that exist, and no test of a row is left out of it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from pages import ROOT

NAMED = set(re.findall(r"`(tests/\S+?\.py::\S+?)`", (ROOT / "docs/faults.md").read_text(encoding="utf-8")))


def found_in(file: Path) -> set[str]:
    """Ids of the tests in a file, as in the table."""
    name = file.relative_to(ROOT).as_posix()
    ids = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        within = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                ids.add(f"{name}::{within}{function.name}")
    return ids


def test_every_test_that_the_table_names_exists() -> None:
    there = {test for file in {ROOT / name.partition("::")[0] for name in NAMED} for test in found_in(file)}
    assert sorted(NAMED - there) == []


def test_every_test_of_a_row_is_in_the_table() -> None:
    rows = {test for file in (ROOT / "tests/cli/faults").glob("test_faults_*.py") for test in found_in(file)}
    assert len(rows) > 20
    assert sorted(rows - NAMED) == []
