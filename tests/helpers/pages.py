"""The pages of the documentation, and the code blocks in them."""

from __future__ import annotations

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
