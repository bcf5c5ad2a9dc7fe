"""The command in several processes, as torchrun starts them: one voice, one end, and a run that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import LAYERS, LIMIT, Run
from processes import Ended, together

from neuronrank_cli import app
from neuronrank_core import NonFiniteError
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.saving.model_writer import ModelWriter

pytestmark = pytest.mark.xdist_group("ranks")
KEPT = f"2 of {LAYERS} layers are finished and saved: rerun the same command to resume"
#: What a rank does wrong in layer 2.
FAULTS: dict[str, Callable[[], None]] = {
    "NaN": lambda: _raise(NonFiniteError("NaN in layer 2", hint="look")),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "full": lambda: _raise(OSError(28, "No space left on device")),
}


def _raise(error: Exception) -> None:
    raise error


def command(arguments: list[object], faulty: list[int], fault: str) -> None:
    """The program; on some ranks with a fault while text runs through layer 2, or while it is written."""
    sys.argv = ["neuronrank", *map(str, arguments)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if int(os.environ["RANK"]) in faulty:
        owner: Any = ModelWriter if fault == "full" else LayerCollector
        name = "keep" if fault == "full" else "add_documents"
        method = getattr(owner, name)

        def failing(self: Any, first: Any, *others: Any) -> None:
            if (first if fault == "full" else self.layer.index) == 2:
                FAULTS[fault]()
            method(self, first, *others)

        setattr(owner, name, failing)
    app.main()


@pytest.fixture
def several(tmp_path: Path, run: Run) -> Callable[..., list[Ended]]:
    """``several(3, "prune", ..., faulty=[1], fault="NaN")``: what is left of three processes."""
    del run  # which has gone to the folder

    def start(size: int, *arguments: object, faulty: tuple[int, ...] = (), fault: str = "") -> list[Ended]:
        output = tmp_path.with_name(f"{tmp_path.name}-output")
        ended = together(size, output, command, list(arguments), list(faulty), fault)
        assert not any("Traceback" in process.stderr for process in ended)
        return ended

    return start


def test_a_failed_rank_ends_all_and_other_ranks_go_on(
    run: Run, several: Any, small: list[object], measured: list[object], tmp_path: Path
) -> None:
    flags = ["prune", *small, *measured, "--batch-size", 1, "--json", "--save"]
    whole = json.loads(run(*flags, "whole").stdout)
    failed = several(3, *flags, tmp_path / "out", faulty=(1, 2), fault="NaN")
    assert [process.code for process in failed] == [1, 1, 1]
    assert [process.stdout for process in failed] == ["", "", ""]
    told = ["Error: NaN in layer 2", "Hint: look", "Note: this happened on rank 1 of 3", f"Note: {KEPT}"]
    assert failed[0].stderr.splitlines()[-4:] == told
    assert [process.stderr for process in failed[1:]] == ["", ""]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "whole"]
    finished = several(2, *flags, tmp_path / "out")
    assert [process.code for process in finished] == [0, 0]
    assert f"resuming: 2 of {LAYERS} layers are finished" in finished[0].stderr
    assert (finished[1].stdout, finished[1].stderr) == ("", "")
    report = json.loads(finished[0].stdout)
    assert report["perplexity"] == whole["perplexity"]
    assert (report["job"]["processes"], whole["job"]["processes"]) == (2, 1)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("fault", "rank", "codes", "told"),
    [
        ("full", 0, [1, 1], ["Error: [Errno 28] No space left on device", "Hint: free some space", f"Note: {KEPT}"]),
        ("kill", 1, [1, -9], [f"Note: {KEPT}"]),
        ("terminate", 1, [143, 143], [f"Terminated; this happened on rank 1 of 2; {KEPT}"]),
        ("interrupt", 0, [130, 130], [f"Interrupted; {KEPT}"]),
    ],
)
def test_a_rank_that_ends_ends_all(
    several: Any, small: list[object], tmp_path: Path, fault: str, rank: int, codes: list[int], told: list[str]
) -> None:
    flags = ["prune", *small, "--batch-size", 1, "--hidden-states", "disk", "--save", tmp_path / "out"]
    ended = several(2, *flags, faulty=(rank,), fault=fault)
    assert [process.code for process in ended] == codes
    assert ended[0].stderr.splitlines()[-len(told) :] == told
    if fault == "kill":
        assert "Error: another process of this run has died or cannot be reached" in ended[0].stderr
    assert (ended[1].stdout, ended[1].stderr) == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert not any(path.name.startswith("hidden") for path in (tmp_path / ".out.partial").iterdir())


@pytest.mark.parametrize(
    "change",
    [
        ["--dataset", "missing.txt"],
        ["--nsamples", 0],
        ["--bogus"],
        ["--nr-q-active", 2],
        ["--sparsity_type", "layers"],
        ["--target-params", 0.8],
    ],
)
def test_wrong_input_is_told_once(several: Any, small: list[object], tmp_path: Path, change: list[object]) -> None:
    ended = several(2, "prune", *small, *change, "--save", tmp_path / "out")
    assert [process.code for process in ended] == [2, 2]
    assert ended[0].stderr.count("Error: ") == 1
    assert [process.stderr for process in ended[1:]] == [""]


def test_torchrun(run: Run, small: list[object], tmp_path: Path) -> None:
    flags = ["prune", *small, "--batch-size", 1, "--update", "least-squares", "--sparsity_type", "neurons"]
    run(*flags, "--save", "whole")
    launcher = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*launcher, "-m", "neuronrank_cli", *flags, "--save", tmp_path / "out"]
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to: ") == 1
    sizes = [json.loads((tmp_path / out / "config.json").read_text())["intermediate_size"] for out in ("whole", "out")]
    assert sizes == [32, 32]


def test_candidates_are_compared_together(run: Run, several: Any, small: list[object], tmp_path: Path) -> None:
    flags = ["prune", *small, "--batch-size", 1, "--effort", "best", "--save"]
    run(*flags, "whole")
    ended = several(2, *flags, tmp_path / "out")
    assert [process.code for process in ended] == [0, 0]
    results = [json.loads((tmp_path / name / "neuronrank.json").read_text())["choice"] for name in ("whole", "out")]
    assert len(results[0]["perplexity"]) > 1
    # Gram matrices are added in another order, so that masks may differ near ties.
    assert results[1]["perplexity"] == pytest.approx(results[0]["perplexity"], rel=3e-3)
    assert results[1]["windows"] == results[0]["windows"]


@pytest.mark.parametrize("save", [["--save", "out"], []])
def test_the_first_rank_writes_the_text(run: Run, several: Any, small: list[object], save: list[str]) -> None:
    flags = ["prune", *small, "--dataset", "self", "--eval", "--eval-windows", 2, "--batch-size", 1, "--json"]
    alone = json.loads(run(*flags, *(save and ["--save", "alone"])).stdout)
    first, second = several(2, *flags, *save)
    assert (first.code, second.code) == (0, 0), first.stderr
    assert "writing the calibration text" in first.stderr
    assert (second.stdout, second.stderr) == ("", "")
    together = json.loads(first.stdout)
    assert together["perplexity"] == alone["perplexity"]
    assert together["calibration"]["text_sha256"] == alone["calibration"]["text_sha256"]


def test_statistics_are_collected_together(run: Run, several: Any, small: list[object], tmp_path: Path) -> None:
    flags = ["collect", *small, "--batch-size", 1, "--save"]
    run(*flags, "whole")
    failed = several(3, *flags, tmp_path / "out", faulty=(2,), fault="NaN")
    assert [process.code for process in failed] == [1, 1, 1]
    assert failed[0].stderr.splitlines()[-2:] == ["Note: this happened on rank 2 of 3", f"Note: {KEPT}"]
    finished = several(2, *flags, tmp_path / "out")
    assert [process.code for process in finished] == [0, 0]
    assert f"resuming: 2 of {LAYERS} layers are finished" in finished[0].stderr
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
