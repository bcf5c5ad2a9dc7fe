"""Whatever goes wrong ends in one line, a hint where there is one, and an exit code; never in a traceback."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Run

import neuronrank_torch.runs.evaluate
import neuronrank_torch.runs.job
import neuronrank_torch.runs.prune
from neuronrank_cli.failures import explain
from neuronrank_core import AllZeroMetricError, InputError


def fail(monkeypatch: pytest.MonkeyPatch, error: BaseException, cause: BaseException | None = None) -> None:
    def raise_it(*_: Any, **__: Any) -> None:
        raise error from cause

    monkeypatch.setattr(neuronrank_torch.runs.prune, "run_prune", raise_it)
    monkeypatch.setattr(neuronrank_torch.runs.evaluate, "run_eval", raise_it)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sparsity_ratio 1.5", "--sparsity_ratio is 1.5, allowed: a number in [0, 1]"),
        (
            "--sparsity_type neurons --sparsity_ratio 1",
            "--sparsity_ratio is 1.0, allowed: below 1 with sparsity_type neurons",
        ),
        ("--nr_q_active 1", "--nr-q-active is 1.0, allowed: a number in (0, 1)"),
        ("--pruning_last 0", "--pruning_last is 0, allowed: a whole number"),
        ("--sparsity_type 4:2", "--sparsity_type is '4:2', allowed: unstructured, neurons, heads, "),
        ("--sparsity_type 2:4 --sparsity_ratio 0.3", "--sparsity_ratio is 0.3, allowed: 0.5 for 2:4"),
        ("--sparsity_type 3:7", "--sparsity_type is '3:7', allowed: an M that divides the 32 inputs of gate_proj"),
        (
            "--prune_method neuronrank_tfidf --nr-tfidf-mode topic --nr-tfidf-k 500",
            "--nr-tfidf-k is 500, allowed: [1, 128], the number of sampled tokens",
        ),
        ("--idf-exp nan", "--idf-exp is nan, allowed: a number in [-10, 10]"),
        ("--prune_method nope", "'nope' is not one of 'dass', 'magnitude'"),
        ("--idf-expp 1", "No such option '--idf-expp'"),
        ("--dataset gone.txt", "file not found: gone.txt"),
        ("--model ./gone", "model not found: ./gone"),
        ("--device nonsense", "device nonsense is not available"),
        ("--nr-prune-lm-head", "the lm_head is tied to the embeddings"),
        ("--seqlen 100000", "the text has"),
        ("--eval --eval-windows 100000", "100000 windows of 32 tokens requested"),
        ("--save text.txt/out", "cannot create"),
        ("--save text.txt", "is a file"),
    ],
)
def test_wrong_input(run: Run, small: list[object], tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "text.txt").write_text("text")
    result = run("prune", *small, "--save", "out", *arguments.split(), code=2)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seqlen 1", "1 is not in the range x>=2"),
        ("--windows 0", "0 is not in the range x>=1"),
        ("--windows 100000", "100000 windows of 64 tokens requested"),
        ("--dataset gone.txt", "file not found: gone.txt"),
    ],
)
def test_wrong_input_to_eval(run: Run, model: Path, text: Path, arguments: str, message: str) -> None:
    result = run("eval", "--model", model, "--dataset", text, "--seqlen", 64, *arguments.split(), code=2)
    assert result.stdout == ""
    assert message in result.stderr


def test_a_run_without_a_result_is_refused(run: Run) -> None:
    assert "give --save, --eval, --sample or --dry-run" in run("prune", "--model", "m", code=2).stderr
    assert "Missing option '--model'" in run("prune", "--save", "s", code=2).stderr


def test_an_existing_output_is_refused_before_any_work(
    run: Run, small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("prune", *small, "--save", "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(neuronrank_torch.runs.prune, "open_model", lambda *_, **__: pytest.fail("loaded"))
        patch.setattr(neuronrank_torch.runs.job, "read_documents", lambda *_: pytest.fail("read"))
        result = run("prune", *small, "--save", "out", "--seed", 5, code=2)
    assert "Error: " in result.stderr
    assert "already exists" in result.stderr
    assert "--force" in result.stderr
    assert result.stdout == ""
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    run("prune", *small, "--save", "out", "--seed", 5, "--force")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device", "free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "Permission denied: 'x'", "permissions"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), "CUDA out of memory. Tried", "--batch-size"),
        (MemoryError(), "out of memory", "--seqlen"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory", "--seqlen"),
        (ZeroDivisionError("division\n\nby zero"), "ZeroDivisionError: division", "NEURONRANK_DEBUG=1"),
        (RuntimeError(), "RuntimeError", "NEURONRANK_DEBUG=1"),
        (AllZeroMetricError("layer 0"), "All-zero metric in layer 0", "lower --nr-q-active"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("command", ["prune", "eval"])
def test_a_failed_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, error: Exception, message: str, hint: str
) -> None:
    fail(monkeypatch, error)
    result = run(command, "--model", "m", *(["--save", "s"] if command == "prune" else []), code=1)
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("Error: ")
    assert message in first
    assert second.startswith("Hint: ")
    assert hint in second
    assert ("--nsamples" in second) <= (command == "prune" or isinstance(error, AllZeroMetricError))


def test_memory_that_ran_out_while_loading_is_no_bad_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, InputError("cannot load m", hint="incomplete"), torch.OutOfMemoryError("too much"))
    result = run("prune", "--model", "m", "--save", "s", code=1)
    assert result.stderr.startswith("Error: out of memory")
    assert "incomplete" not in result.stderr


def test_tracebacks_on_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, ZeroDivisionError("by zero"))
    with pytest.raises(AssertionError, match="Traceback"):
        run("prune", "--model", "m", "--save", "s", code=1, env={"NEURONRANK_DEBUG": "1"})


def test_control_c(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, KeyboardInterrupt())
    result = run("prune", "--model", "m", "--save", "s", code=130)
    assert result.stdout == ""
    assert result.stderr == "Interrupted; nothing was saved\n"


def test_control_c_while_saving(run: Run, small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: int) -> None:
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    run("prune", *small, "--save", "out", code=130)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert run("eval", "--model", "m", code=1).stderr == ""


def test_a_percentage_gets_a_hint(run: Run, small: list[object]) -> None:
    shown = run("prune", *small, "--save", "out", "--sparsity_ratio", 50, code=2).stderr
    assert shown == "Error: --sparsity_ratio is 50.0, allowed: a number in [0, 1]\nHint: did you mean 0.5?\n"


def test_unknown_environment_variables_are_named(run: Run, small: list[object]) -> None:
    env = {"NEURONRANK_PRUNE_NSAMPLE": "3", "NEURONRANK_EVAL_SEQLEN": "8", "NEURONRANK_DEBUG": ""}
    shown = run("prune", *small, "--dry-run", env=env).stderr.splitlines()
    assert [line for line in shown if "environment" in line] == [
        "Warning: unknown environment variable NEURONRANK_PRUNE_NSAMPLE; did you mean NEURONRANK_PRUNE_NSAMPLES?",
    ]


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300])
def test_names_that_no_file_can_have(run: Run, model: Path, text: Path, name: str) -> None:
    given = ["--model", model, "--dataset", text, "--nsamples", 2, "--seqlen", 32]
    for arguments in (
        ["prune", *given, "--save", name],
        ["prune", *given, "--stats", name],
        ["prune", *given, "--config", name],
        ["prune", "--model", model, "--dataset", name],
        ["collect", *given, "--save", name],
        ["merge", name, name, "--save", "out"],
        ["report", name],
        ["sweep", *given, "--out", name],
        ["eval", "--model", name],
    ):
        error = run(*arguments, code=2).stderr
        assert "unexpected" not in error
        assert "Error: " in error


def test_one_variable_of_a_launcher_is_no_launcher(run: Run) -> None:
    for rank in ("1", ""):
        assert (
            run("prune", "--model", "./gone", "--dry-run", env={"RANK": rank}, code=2).stderr.count("model not found")
            == 1
        )


def test_out_of_memory_names_flags_that_the_command_has() -> None:
    assert explain(MemoryError("x"), {}).hint == "free some memory"
    assert explain(MemoryError("x"), {"device": "--device"}).hint == "try another --device"
    given = {name: f"--{name}" for name in ("batch_size", "seqlen", "device")}
    assert explain(MemoryError("x"), given).hint == "lower --batch_size, --seqlen; or try another --device"
