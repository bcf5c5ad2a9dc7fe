"""The method of the page on extending passes the tests of all methods when it is dropped in as a file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks

PAGE = [block.code for block in blocks("python") if block.page == "docs/understand/extending.md"]
CODE = next(code for code in PAGE if "METHOD = " in code)
TEST = next(code for code in PAGE if "def test_" in code)

CORE = [ROOT / "tests/core" / name for name in ("methods", "test_flags_are_read.py", "test_estimator.py")]
#: Not the name on the page, under which the file may be in the repository.
COPY = Path("test_loud_of_the_page.py")
CORE.append(COPY)
TORCH = ["-k", "loud", ROOT / "tests/torch/pruning"]


@pytest.mark.parametrize("tests", [CORE, TORCH], ids=["core", "torch"])
def test_it_passes_the_tests_of_all_methods(tmp_path: Path, tests: list[object]) -> None:
    core = tmp_path / "neuronrank_core"
    shutil.copytree(ROOT / "neuronrank_core", core, ignore=shutil.ignore_patterns("__pycache__"))
    (core / "methods" / "loud.py").write_text(CODE, encoding="utf-8")
    (tmp_path / COPY).write_text(TEST, encoding="utf-8")
    options = ["-v", "-p", "no:cacheprovider", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml"]
    # Run in the copy's folder, which is then first on the path.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, [*options, *tests])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [tmp_path, ROOT])), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"\[.*loud.*\] PASSED", done.stdout)) > 10
    assert ("test_gate_by_hand" in done.stdout) == (tests is CORE)
