"""Rows of docs/faults.md: a process that is told to end, killed, or given too little memory, at any layer."""

from __future__ import annotations

import errno
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import LAYERS, Run
from faults import weights_and_settings

from neuronrank_cli.app import _terminate
from neuronrank_torch.pruning.prune import _PruneRun

Flags = list[object]


@pytest.fixture(autouse=True)
def _as_the_program_does() -> Iterator[None]:
    """SIGTERM ends a run by unwinding, as in :func:`neuronrank_cli.app.main`."""
    before = signal.signal(signal.SIGTERM, _terminate)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def whole(run: Run, small: Flags) -> dict[str, bytes]:
    """What a run that nobody disturbs saves; its report, which has times in it, aside."""
    run("prune", *small, "--save", "whole")
    return weights_and_settings(Path("whole"))


def at_layer(monkeypatch: pytest.MonkeyPatch, layer: int, act: Callable[[], Any]) -> Callable[[], None]:
    """Have something happen once in the midst of a layer, between two micro-batches; returns what lifts it."""
    step = _PruneRun._step

    def acted(self: _PruneRun, at: int) -> None:
        step(self, at)
        if at == layer:
            monkeypatch.setattr(_PruneRun, "_step", step)
            act()

    monkeypatch.setattr(_PruneRun, "_step", acted)
    return lambda: monkeypatch.setattr(_PruneRun, "_step", step)


def kept(layers: int) -> str:
    return f"{layers} of {LAYERS} layers are finished and saved: rerun the same command to resume"


def goes_on(run: Run, small: Flags, whole: dict[str, bytes], after: int) -> None:
    """The same command finishes with the same bits and leaves nothing else."""
    resumed = run("prune", *small, "--save", "out")
    assert (f"resuming: {after} of {LAYERS} layers are finished" in resumed.stderr) == (after > 0)
    assert weights_and_settings(Path("out")) == whole
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")]
)
def test_signals(
    run: Run,
    small: Flags,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    layer: int,
    number: signal.Signals,
    code: int,
    word: str,
) -> None:
    at_layer(monkeypatch, layer, lambda: os.kill(os.getpid(), number))
    stopped = run("prune", *small, "--save", "out", code=code)
    assert stopped.stdout == ""
    assert stopped.stderr.splitlines()[-1] == f"{word}; {kept(layer) if layer else 'nothing was saved'}"
    assert {path.name for path in Path.cwd().iterdir()} == {"whole", *([".out.partial"] if layer else [])}
    goes_on(run, small, whole, layer)


def forked(act: Callable[[], int]) -> int:
    """Do something in a process of its own, a copy of this one, which exits with the number returned; its status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Of forking beside threads, which are idle here.
        child = os.fork()
    if child == 0:
        code = 99
        try:
            code = act()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("layer", range(LAYERS))
def test_killed(run: Run, small: Flags, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    def prune() -> int:
        at_layer(monkeypatch, layer, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return run("prune", *small, "--save", "out").exit_code

    assert forked(prune) == signal.SIGKILL
    assert {path.name for path in Path.cwd().iterdir()} == {"whole", ".out.partial"}
    goes_on(run, small, whole, layer)


#: As allocators say it.
NO_MEMORY = {
    "python": (MemoryError,),
    "cuda": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": (RuntimeError, "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
    "windows": (RuntimeError, "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory"),
    "mps": (RuntimeError, "MPS backend out of memory"),
    "cublas": (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    "system": (OSError, errno.ENOMEM, "Cannot allocate memory"),
}


@pytest.mark.parametrize(
    ("layer", "kind"), [*((i, "python") for i in range(LAYERS)), *((1, kind) for kind in NO_MEMORY)]
)
def test_out_of_memory(
    run: Run, small: Flags, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, layer: int, kind: str
) -> None:
    error, *arguments = NO_MEMORY[kind]

    def fail() -> None:
        raise error(*arguments)

    at_layer(monkeypatch, layer, fail)
    failed = run("prune", *small, "--save", "out", code=1)
    lines = [line for line in failed.stderr.splitlines() if line.startswith(("Error: ", "Hint: ", "Note: "))]
    assert lines[0].startswith("Error: out of memory: ")
    for flag in ("--batch-size", "--nsamples", "--seqlen", "--hidden-states disk"):
        assert flag in lines[1]
    assert lines[2:] == [f"Note: {kept(layer)}"] * bool(layer)
    goes_on(run, small, whole, layer)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_too_little_memory_for_real(run: Run, small: Flags) -> None:
    """A process that may have 256 MiB more than it has; the calibration sequences need 1.5 GiB."""

    def prune() -> int:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
        failed = run("prune", *small, "--nsamples", 400_000, "--seqlen", 500, "--save", "out", code=1)
        error, hint = failed.stderr.splitlines()[-2:]
        return 7 * (error.startswith("Error: out of memory: ") and "--nsamples" in hint)

    assert os.waitstatus_to_exitcode(forked(prune)) == 7
    assert list(Path.cwd().iterdir()) == []
