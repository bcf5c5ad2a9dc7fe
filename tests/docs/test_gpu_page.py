"""The tables of the page about GPUs are those that the script computes."""

from __future__ import annotations

import subprocess
import sys

from pages import DOCS, ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_model.py"


def test_the_tables_are_those_of_the_script() -> None:
    done = subprocess.run([sys.executable, SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    page = (DOCS / "measured" / "gpu.md").read_text("utf-8")
    for name, table in zip(("memory", "time"), done.stdout.strip().split("\n\n"), strict=True):
        assert f"<!-- {name} -->\n{table}\n<!-- end of {name} -->" in page
