"""Every error that the program can raise is on the troubleshooting page, in the words in which it is raised."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from pages import DOCS, ROOT

PAGE = (DOCS / "start" / "troubleshooting.md").read_text("utf-8")
#: First cells of the tables, less their backticks.
LISTED = {line.split(" | ")[0].removeprefix("| ").replace("`", "").strip() for line in PAGE.splitlines()}
#: Which argument of an error is its message. Of InvalidValueError, whose message has one form, nothing is.
MESSAGE = {
    "InputError": 0,
    "UnreachableError": 0,
    "UnsupportedModelError": 0,
    "NonFiniteError": 0,
    "NeuronRankError": 0,
    "UsageError": 0,
    "MissingStatisticsError": 1,
    "_unsupported": 1,
}
#: What a function puts before the message that it is given.
BEFORE = {"_unsupported": "… "}


def template(message: ast.expr) -> str | None:
    """A message with … for what is filled in; None where it is all filled in."""
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in message.values)
        return re.sub("…+", "…", text)
    return None


def raised() -> Iterator[tuple[str, str]]:
    """Where an error is made, and its message."""
    for file in sorted(ROOT.glob("neuronrank_*/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in MESSAGE and len(node.args) > MESSAGE[name]:
                text = template(node.args[MESSAGE[name]])
                if text and re.search(r"\w", text):
                    yield f"{file.relative_to(ROOT).as_posix()}:{node.lineno}", BEFORE.get(name, "") + text


ERRORS = dict(raised())


def test_the_page_has_them() -> None:
    missing = {where: text for where, text in ERRORS.items() if text.replace("`", "") not in LISTED}
    assert not missing, "add them to docs/start/troubleshooting.md"


def test_all_kinds_are_seen() -> None:
    assert len(ERRORS) > 60
    assert "layer … (…) has … MLPs" in ERRORS.values()
    assert "… called … of its … layers" in ERRORS.values()
    assert "no column …" in ERRORS.values()
