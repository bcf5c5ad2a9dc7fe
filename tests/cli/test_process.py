"""The command as a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import LIMIT, PROGRAM


def test_prune_and_eval(model: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "neuronrank_cli"]
    flags = ["--dataset", text, "--seqlen", "32", "--json"]
    protocol = ["--eval", "--eval-dataset", text, "--eval-windows", "3"]
    pruning = [*command, "prune", "--model", model, *flags, "--nsamples", "4", *protocol, "--save", tmp_path / "out"]
    pruned = subprocess.run(pruning, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert pruned.returncode == 0, pruned.stderr
    report = json.loads(pruned.stdout)
    evaluation = [*command, "eval", "--model", tmp_path / "out", *flags, "--windows", "3"]
    measured = subprocess.run(evaluation, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["perplexity"] == pytest.approx(report["perplexity"]["after"]["perplexity"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_control_c_while_pruning(model: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--model", model, "--dataset", text, "--nsamples", "5000", "--seqlen", "64", "--batch-size", "1"]
    command = [sys.executable, "-c", PROGRAM.format(""), "prune", *flags, "--save", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("calibrating layer"):
                process.send_signal(signal.SIGINT)
                break
        stdout, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.splitlines()[-1].startswith("Interrupted")
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_a_batch_job_while_saving(model: Path, tmp_path: Path) -> None:
    interfere = f"""
import os, pathlib
def stop(descriptor):
    print("on disk:", *(path.name for path in pathlib.Path({str(tmp_path)!r}).iterdir()), file=sys.stderr)
    os.kill(os.getpid(), {int(signal.SIGTERM)})
os.fsync = stop
"""
    flags = ["--model", model, "--prune_method", "magnitude", "--save", tmp_path / "out"]
    command = [sys.executable, "-c", PROGRAM.format(interfere), "prune", *flags]
    process = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    assert "on disk: .out.partial\n" in process.stderr
    assert "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []
