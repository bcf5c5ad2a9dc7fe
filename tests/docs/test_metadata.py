"""What is stated about the project in more than one place is the same in all."""

from __future__ import annotations

import re

from pages import DOCS, PAGES, ROOT

from neuronrank_core import __version__


def test_the_citation_is_of_this_version() -> None:
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE) == [__version__]


def test_ci_runs_the_script_on_the_oldest_python() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    [oldest] = re.findall(r'requires-python = ">=(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert "run: .ci/run" in workflow
    assert f'"{oldest}"' in workflow


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = set()
    for toctree in re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text("utf-8"), re.DOTALL):
        patterns = [line for line in toctree.splitlines() if line and not line.startswith(":")]
        listed |= {file for pattern in patterns for file in DOCS.glob(f"{pattern}.md")}
    pages = {file for file in PAGES.values() if file.is_relative_to(DOCS)}
    assert listed == pages - {DOCS / "index.md"}
