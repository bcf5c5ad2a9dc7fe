"""Ctrl-C reaches the tests and the programs that they start, even where whatever started the tests ignores it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

#: Run in a fresh pytest below.
HERE = f"{Path(__file__).resolve()}::test_ctrl_c_arrives"
RAISES = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"


def test_ctrl_c_arrives() -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    child = subprocess.run([sys.executable, "-c", RAISES], capture_output=True, check=False)
    assert child.returncode == -signal.SIGINT


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_arrives_in_a_background_job(workers: int) -> None:
    """As `make test &` starts it, in this process and in a worker of xdist."""
    arguments = ["-q", "-n", str(workers), "-p", "no:cacheprovider", HERE]
    program = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import pytest; pytest.main({arguments})"
    inner = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "1 passed" in inner.stdout, inner.stdout
