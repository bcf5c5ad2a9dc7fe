"""A run that was cut off goes on: killed for real at any moment, or stopped after any layer, to the same weights."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import LAYERS, LIMIT, PROGRAM, Run, stop_after
from tiny import tiny_model
from tiny_files import write_model

from neuronrank_core import NonFiniteError

#: Counts the program's own function calls from when it saves the first layer, and kills it at one of them.
KILLED = """
import atexit, os
from neuronrank_torch.saving.model_writer import ModelWriter
calls, keep = 0, ModelWriter.keep
def count(frame, event, argument):
    global calls
    if event == "call" and "neuronrank_torch" in frame.f_code.co_filename:
        calls += 1
        if calls == {0}:
            os.kill(os.getpid(), signal.SIGKILL)
def counted(*arguments):
    sys.setprofile(count)
    keep(*arguments)
ModelWriter.keep = counted
atexit.register(lambda: (sys.setprofile(None), print("calls", calls, file=sys.stderr)))
"""


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "untied"
    return write_model(folder, tiny_model(layers=LAYERS, hidden=32, intermediate=64, tied=False))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_killed_at_three_moments(model: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--model", model, "--dataset", text, "--nsamples", "4", "--seqlen", "32", "--batch-size", "1"]

    def run(out: str, at: int) -> subprocess.CompletedProcess[str]:
        program = PROGRAM.format(KILLED.format(at))
        command = [sys.executable, "-c", program, "prune", *flags, "--save", tmp_path / out]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)

    whole = run("whole", 0)
    assert whole.returncode == 0, whole.stderr
    calls = int(re.findall(r"^calls (\d+)$", whole.stderr, re.MULTILINE)[0])
    moments = random.Random(5)
    for _ in range(3):
        killed = run("out", moments.randrange(1, calls // (2 * LAYERS)))  # In the next layer.
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "whole"]
    finished = run("out", 0)
    assert finished.returncode == 0, finished.stderr
    assert re.search(rf"^resuming: [1-{LAYERS}] of {LAYERS} layers are finished$", finished.stderr, re.MULTILINE)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("units", [1, LAYERS - 1, LAYERS, LAYERS + 1])
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--propagate dense --nr-include-attention",
        "--update least-squares",
        "--update gradual --update-target model",
        "--update least-squares --update-target model --pruning_last 3",
        "--sparsity_type neurons --sparsity_ratio 0.25",
        "--sparsity_type heads --update least-squares",
        "--sparsity_type query-heads",
        "--pruning_last 2",
        "--allocate neuronrank --pruning_last 3",
        "--nr-prune-lm-head",
        "--nr-prune-lm-head --prune_method magnitude",
        "--hidden-states disk --batch-size 3",
    ],
)
def test_stopped_after_any_unit(
    run: Run, untied: Path, small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, units: int
) -> None:
    if units > LAYERS and "lm-head" not in flags:
        pytest.skip("no such unit")
    check_resumed(run, ["prune", *small, "--model", untied, *flags.split()], units, tmp_path, monkeypatch)


def test_a_target_behind_a_norm_after_a_stop(
    run: Run,
    small: list[object],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = write_model(tmp_path_factory.mktemp("gemma3"), tiny_model("gemma3", layers=LAYERS))
    flags = ["--update", "least-squares", "--update-target", "model"]
    check_resumed(run, ["prune", *small, "--model", model, *flags], 2, tmp_path, monkeypatch)


def check_resumed(run: Run, command: list[object], units: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a command that was stopped after ``units`` and resumed ends as one that was not stopped."""
    run(*command, "--save", "whole")
    lift = stop_after(monkeypatch, units, KeyboardInterrupt())
    stopped = run(*command, "--save", "out", code=130)
    kept = f"{min(units, LAYERS)} of {LAYERS} layers are finished and saved: rerun the same command to resume"
    assert stopped.stderr.splitlines()[-1] == f"Interrupted; {kept}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "whole"]
    lift()
    finished = run(*command, "--save", "out")
    assert f"resuming: {min(units, LAYERS)} of {LAYERS} layers are finished" in finished.stderr
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    one, other = (json.loads((tmp_path / out / "neuronrank.json").read_text("utf-8")) for out in ("whole", "out"))
    for report in (one, other):
        del report["seconds"], report["job"]
        for layer in report["layers"]:
            del layer["seconds"]
    assert one == other
    for file in ("config.json", "README.md"):
        texts = [(tmp_path / out / file).read_text("utf-8").replace(f"save {out}", "") for out in ("out", "whole")]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (NonFiniteError("NaN in layer 2"), 1, "Note: "),
        (OSError(28, "No space left on device"), 1, "Note: "),
        (MemoryError(), 1, "Note: "),
        (SystemExit(143), 143, "Terminated; "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_failures_keep_what_is_done(
    run: Run,
    small: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    last: str,
) -> None:
    lift = stop_after(monkeypatch, 2, error)
    failed = run("prune", *small, "--save", "out", code=code)
    kept = f"2 of {LAYERS} layers are finished and saved: rerun the same command to resume"
    assert failed.stderr.splitlines()[-1] == last + kept
    lift()
    assert "resuming: 2 of" in run("prune", *small, "--save", "out").stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_resumed_run_measures_what_a_whole_one_does(
    run: Run, small: list[object], measured: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.loads(run("prune", *small, *measured, "--save", "whole", "--json").stdout)
    lift = stop_after(monkeypatch, 1, KeyboardInterrupt())
    run("prune", *small, *measured, "--save", "out", code=130)
    lift()
    resumed = run("prune", *small, *measured, "--save", "out", "--json")
    assert "perplexity after" in resumed.stderr
    assert json.loads(resumed.stdout)["perplexity"] == whole["perplexity"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("--sparsity_ratio 0.6", "sparsity_ratio was 0.5, is 0.6"),
        ("--seed 1 --nsamples 5", "nsamples was 4, is 5; seed was 0, is 1"),
        ("--dtype bfloat16", "dtype was auto, is bfloat16"),
        ("--batch-size 1", "batch_size was None, is 1"),
        ("--dataset other.txt", "calibration text was "),
        ("--eval --eval-dataset other.txt", "evaluation"),
        ("touch", "file model.safetensors was ["),
    ],
)
def test_a_changed_run_is_refused(
    run: Run, small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, difference: str
) -> None:
    copy = tmp_path / "source"
    copy.mkdir()
    for file in Path(str(small[1])).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other.txt").write_text("Other text. " * 200)
    command = ["prune", *small, "--model", copy, "--save", "out"]
    lift = stop_after(monkeypatch, 2, KeyboardInterrupt())
    run(*command, code=130)
    lift()
    before = {path: path.read_bytes() for path in (tmp_path / ".out.partial").iterdir() if path.is_file()}
    changed = [] if change == "touch" else shlex.split(change)
    if change == "touch":
        os.utime(copy / "model.safetensors", ns=(1, 1))
    refused = run(*command, *changed, code=2)
    first, second = refused.stderr.splitlines()[-2:]
    assert first.startswith("Error: an unfinished run for this output differs from this one: ")
    assert difference in first
    assert "--force" in second
    assert {path: path.read_bytes() for path in (tmp_path / ".out.partial").iterdir() if path.is_file()} == before
    forced = run(*command, *changed, "--force")
    assert "resuming" not in forced.stderr
    assert not (tmp_path / ".out.partial").exists()
