"""The folder that a run builds its output in: one run at a time, also on systems that cannot delete open files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from neuronrank_core.errors import InputError, NeuronRankError, UnreachableError, UnsupportedModelError
from neuronrank_torch.saving.output_writer import OutputWriter

HOLD = """
import sys
from pathlib import Path
from neuronrank_torch.saving.output_writer import OutputWriter
with OutputWriter(Path(sys.argv[1]), {}, 1) as folder:
    print("locked", flush=True)
    sys.stdin.read()
"""


def folder_of(tmp_path: Path) -> OutputWriter:
    return OutputWriter(tmp_path / "out", {}, 2)


def finish_layer(folder: OutputWriter) -> None:
    shard = folder.output / "shard"
    shard.write_text("weights")
    folder.journal.finish(shard, None)


def test_another_process_is_kept_out_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(NeuronRankError, match=r"^another run is writing to .*out$"), folder_of(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with folder_of(tmp_path) as folder:
        assert folder.output.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_run_removes_before_the_lock_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(FileLock, "acquire", late)
    with pytest.raises(NeuronRankError, match="another run is writing to"), folder_of(tmp_path):
        pass


def test_the_folder_is_gone_before_the_lock_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a run that gets the lock at that moment would lose its folder."""
    release, there = FileLock.release, []
    monkeypatch.setattr(
        FileLock, "release", lambda self: (there.append((tmp_path / ".out.partial").exists()), release(self))
    )
    with folder_of(tmp_path):
        pass
    assert there == [False]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that refuses to delete a file while it is locked."""
    unlink, locked = os.unlink, set()
    acquire, release = FileLock.acquire, FileLock.release

    def refuse(path: Any, **options: Any) -> None:
        if Path(path).name in locked:
            raise PermissionError(13, "the file is in use", str(path))
        unlink(path, **options)

    def acquired(self: Any, *arguments: Any, **options: Any) -> Any:
        taken = acquire(self, *arguments, **options)
        locked.add("lock")
        return taken

    monkeypatch.setattr(os, "unlink", refuse)
    monkeypatch.setattr(FileLock, "acquire", acquired)
    monkeypatch.setattr(FileLock, "release", lambda self: (locked.clear(), release(self)))


@pytest.mark.usefixtures("windows")
def test_nothing_is_left_where_open_files_cannot_be_deleted(tmp_path: Path) -> None:
    with folder_of(tmp_path) as folder:
        finish_layer(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("finished", [True, False])
def test_the_lock_is_released_after_an_error(tmp_path: Path, finished: bool) -> None:
    stopped = folder_of(tmp_path)  # Kept, because a lock that is garbage is released too.

    def interrupted() -> None:
        with stopped as folder:
            if finished:
                finish_layer(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted()
    note = "1 of 2 layers are finished and saved: rerun the same command to resume"
    assert getattr(caught.value, "__notes__", []) == [note] * finished
    with folder_of(tmp_path) as folder:
        assert list(folder.journal.shards) == ["shard"] * finished


@pytest.mark.parametrize("notes", [False, True])
@pytest.mark.parametrize("error", [UnreachableError, UnsupportedModelError])
def test_nothing_is_kept_after_an_error_that_the_same_run_would_meet_again(
    tmp_path: Path, error: type[NeuronRankError], notes: bool
) -> None:
    def failing() -> None:
        with OutputWriter(tmp_path / "new" / "er" / "out", {}, 2) as folder:
            finish_layer(folder)
            if notes:
                (tmp_path / "new" / "notes.txt").write_text("mine")
            raise error("so it is")

    with pytest.raises(error) as caught:
        failing()
    assert not getattr(caught.value, "__notes__", [])
    assert [*tmp_path.rglob("*")] == [tmp_path / "new", tmp_path / "new" / "notes.txt"] * notes


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"^cannot create .*out: .*Not a directory"):
        OutputWriter(tmp_path / "file" / "out", {}, 2).__enter__()


def test_the_lock_is_released_if_the_output_exists_by_now(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    late = folder_of(tmp_path)  # Kept, because a lock that is garbage is released too.
    with pytest.raises(NeuronRankError, match="already exists"), late:
        pass
    (tmp_path / "out").rmdir()
    with folder_of(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
