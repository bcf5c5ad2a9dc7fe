"""The pages of the documentation, and the code blocks in them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: By the name that a test has.
PAGES = {
    file.relative_to(ROOT).as_posix(): file
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
    if "_build" not in file.parts
}


def returned(function: str, *given: object) -> str:
    """The text that a function of a script in ``benchmarks`` (``script.function``) returns."""
    module = function.partition(".")[0]
    code = f"import {module}, json, sys; print({function}(*json.load(sys.stdin)), end='')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(given),
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    code: str
    #: Of its first line of code, from 1.
    line: int


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in one of the languages."""
    found = []
    for page, file in PAGES.items():
        for token in MarkdownIt().parse(file.read_text("utf-8")):
            if token.type == "fence" and token.info in languages and token.map:
                found.append(Block(page, token.info, token.content, token.map[0] + 2))
    return found
