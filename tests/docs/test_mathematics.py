"""Each formula of the mathematics page has one function of its own, and a worked number that the function gives."""

from __future__ import annotations

import doctest
import importlib
import re
from typing import Any

import pytest
from pages import DOCS, blocks

PAGE = (DOCS / "understand" / "mathematics.md").read_text("utf-8")
BEFORE, *_REST = re.split(r"^### ", PAGE, flags=re.MULTILINE)
#: By its heading, the part of the page on each formula.
SECTIONS = {text.partition("\n")[0]: re.split(r"^## ", text, flags=re.MULTILINE)[0] for text in _REST}
ROLE = re.compile(r"^\{(func|meth|class)\}`~([\w.]+)`$", re.MULTILINE)


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


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_formula_leads_to_its_function(heading: str) -> None:
    [(role, path)] = ROLE.findall(SECTIONS[heading])
    value = found(path)
    assert callable(value)
    assert value.__doc__
    assert value.__name__ == path.rpartition(".")[2]
    assert (role == "class") == isinstance(value, type)


@pytest.mark.parametrize("heading", SECTIONS)
def test_formula_function_and_number_follow_each_other(heading: str) -> None:
    text = SECTIONS[heading]
    formula, role, number = text.index("$$\n"), ROLE.search(text), text.index("```pycon")
    assert text.count("$$") == 2
    assert role is not None
    assert formula < role.start() < number
    name = role[2].rpartition(".")[2]
    example = re.findall(r"```pycon\n(.*?)```", text, re.DOTALL)
    assert re.search(rf"\b{name}\(", "".join(example)), f"the example does not call {name}"
    assert re.search(r"^(?!>>>|\.\.\.)\S.*\d", "".join(example), re.MULTILINE) or "True" in example[0], "no number"


def test_no_formula_has_two_homes() -> None:
    assert len(SECTIONS) > 40
    paths = re.findall(r"~([\w.]+)`", PAGE)
    assert len(set(paths)) == len(paths) == len(SECTIONS)


def test_no_formula_stands_outside_a_section() -> None:
    assert PAGE.count("$$") == 2 * len(SECTIONS)


def test_the_numbers_are_as_shown() -> None:
    runner, seen = doctest.DocTestRunner(verbose=False), {}
    said: list[str] = []
    for block in blocks("pycon"):
        if block.page != "docs/understand/mathematics.md":
            continue
        test = doctest.DocTestParser().get_doctest(block.code, seen, block.page, block.page, block.line - 1)
        runner.run(test, out=said.append, clear_globs=False)
        seen = test.globs
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
    assert runner.tries > len(SECTIONS)
