"""Each formula of the mathematics page names one function of the core, and each is there."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
from pages import DOCS

PAGE = (DOCS / "understand" / "mathematics.md").read_text("utf-8")
#: Rows of tables, less their headings.
ROWS = [
    line for line in PAGE.splitlines() if line.startswith("| ") and not re.match(r"\| (---|.*\| function \|)", line)
]


def found(path: str) -> Any:
    """The object of a dotted path: the longest module in it, then attributes."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            value = getattr(value, name)
        return value
    raise AssertionError(path)


@pytest.mark.parametrize("row", ROWS)
def test_the_formula_leads_to_its_function(row: str) -> None:
    [(role, path)] = re.findall(r"\{(func|meth|class)\}`~([\w.]+)`", row)
    value = found(path)
    assert callable(value)
    assert value.__doc__
    assert value.__name__ == path.rpartition(".")[2]
    assert (role == "class") == isinstance(value, type)


def test_no_formula_has_two_homes() -> None:
    assert len(ROWS) > 40
    paths = re.findall(r"~([\w.]+)`", PAGE)
    assert len(set(paths)) == len(paths)
