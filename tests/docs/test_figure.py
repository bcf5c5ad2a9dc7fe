"""The figure of the first page is that of the results in the repository."""

from __future__ import annotations

import subprocess
import sys

from pages import DOCS, ROOT

DRAW = "import figure; print(figure.draw(figure.measured()), end='')"


def test_the_figure_shows_the_results() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRAW], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    assert done.stdout == (DOCS / "measured" / "quality.svg").read_text("utf-8")
