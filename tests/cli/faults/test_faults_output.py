"""Rows of docs/faults.md: outputs that cannot or must not be written, full disks, and two runs at once."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command import LAYERS, Run, stop_after
from faults import copied, refused, tree, weights_and_settings

import neuronrank_torch.runs.prune
from neuronrank_torch.saving import model_writer as staging

Flags = list[object]
WAYS = [["--save", "out"], ["--save", "out", "--dry-run"]]


@pytest.mark.parametrize("way", WAYS)
def test_output_exists(run: Run, small: Flags, model: Path, way: Flags) -> None:
    shutil.copytree(model, "out")
    error = refused(run, "prune", *small, *way, code=2, says="out already exists", hint="--force")
    assert "loading" not in error


@pytest.mark.parametrize("way", WAYS)
def test_output_is_something_else(run: Run, small: Flags, way: Flags) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years of work")
    says = "out is not a saved model, or has subfolders, so even --force does not delete it"
    refused(run, "prune", *small, *way, "--force", code=2, says=says, hint="another output folder")
    refused(run, "prune", *small, *way[:1], "out/thesis.txt", *way[2:], code=2, says="is a file", hint="another")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parent", [".", "new"])
def test_output_is_read_only(run: Run, small: Flags, way: Flags, parent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("locked").mkdir(mode=0o555)
    if os.access("locked", os.W_OK):  # The administrator may write anywhere.
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    place = Path("locked", parent, "out")
    says = f"cannot create {place.resolve()}: {Path('locked').resolve()} is not writable"
    refused(run, "prune", *small, *way, "--save", place, code=2, says=says, hint="another output folder")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("place", ["source", "link", "."])
def test_output_is_the_models_own_folder(
    run: Run, small: Flags, model: Path, way: Flags, force: Flags, place: str
) -> None:
    Path("link").symlink_to(copied(model))
    arguments = ["prune", *small, "--model", "source", *way, "--save", place, *force]
    if force and place != ".":
        refused(run, *arguments, code=2, says="source contains the input model (source)", hint="another")
    else:
        refused(run, *arguments, code=2, says="is not a saved model" if force else "already exists")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Iterator[Callable[[int], None]]:
    """A disk of its own as the working folder; ``disk(n)`` gives it a size of n KiB."""
    del run  # Which changes to tmp_path first.
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be made here: {error}")
    monkeypatch.chdir(place)

    def resize(kibibytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kibibytes}k", str(place)], check=True, capture_output=True)

    yield resize
    monkeypatch.chdir(tmp_path)
    subprocess.run(["umount", str(place)], check=True, capture_output=True)


@pytest.mark.parametrize("flags", [[], ["--hidden-states", "disk"]], ids=["memory", "disk"])
def test_disk_is_full(run: Run, small: Flags, disk: Callable[[int], None], flags: Flags) -> None:
    command: Flags = ["prune", *small, *flags, "--save"]
    disk(8192)
    run(*command, "whole")
    whole = weights_and_settings(Path("whole"))
    used = sum(-(-len(content) // 4096) * 4 for content in tree(Path("whole")).values())
    shutil.rmtree("whole")
    ends = set()
    for kibibytes in range(8, 2 * used + 64, 24):
        disk(kibibytes)
        result = run(*command, "out", code=None)
        if result.exit_code == 0:
            break
        assert result.exit_code == 1, result.output
        assert "unexpected error" not in result.stderr
        assert "No space left on device" in result.stderr
        assert "space" in result.stderr.split("Hint: ")[1]
        assert {path.name for path in Path.cwd().iterdir()} <= {".out.partial"}
        ends.add("Note: " in result.stderr)
        if "Note: " not in result.stderr:
            assert list(Path.cwd().iterdir()) == []
    assert ends == {True, False}, "the disk was never full before, or never after, the first finished layer"
    assert [path.name for path in Path.cwd().iterdir()] == ["out"]
    # Together, the runs that were cut off made what an undisturbed one makes.
    assert weights_and_settings(Path("out")) == whole


def test_two_runs_at_once(run: Run, small: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    prune, others = neuronrank_torch.runs.prune.prune_in_passes, []

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(neuronrank_torch.runs.prune, "prune_in_passes", prune)
        for flags in ([], ["--force"], ["--seed", 3]):
            says = "another run is writing to"
            others.append(refused(run, "prune", *small, "--save", "out", *flags, code=1, says=says, hint="wait for it"))
        return prune(*arguments, **options)

    monkeypatch.setattr(neuronrank_torch.runs.prune, "prune_in_passes", meanwhile)
    run("prune", *small, "--save", "out")
    assert len(others) == 3


def test_a_run_that_starts_while_another_finishes(run: Run, small: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has the lock until its folder is gone, and then there is an output that nobody said to replace."""
    entered = staging.ModelWriter.__enter__

    def late(self: staging.ModelWriter) -> staging.ModelWriter:
        monkeypatch.setattr(staging.ModelWriter, "__enter__", entered)
        run("prune", *small, "--save", "out", "--seed", 3)
        before.update(tree(Path("out")))
        return entered(self)

    before: dict[str, bytes] = {}
    monkeypatch.setattr(staging.ModelWriter, "__enter__", late)
    assert "out already exists" in run("prune", *small, "--save", "out", code=2).stderr
    assert tree(Path.cwd()) == {f"out/{name}": content for name, content in before.items()}


def test_a_lock_on_a_file_that_is_gone_is_none(run: Run, small: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    flock, lock = fcntl.flock, Path(".out.partial/lock")
    replaced = []

    def finished_meanwhile(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        if how & fcntl.LOCK_EX:
            lock.unlink()
            lock.touch()
            replaced.append(lock)

    monkeypatch.setattr(fcntl, "flock", finished_meanwhile)
    error = run("prune", *small, "--save", "out", code=1).stderr
    assert "another run is writing to" in error
    assert len(replaced) == 1


def test_what_someone_saved_there_meanwhile_is_kept(
    run: Run, small: Flags, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = staging.ModelWriter.finish

    def late(self: staging.ModelWriter, *arguments: Any) -> None:
        if not self.target.exists():
            shutil.copytree(model, self.target)
        finish(self, *arguments)

    monkeypatch.setattr(staging.ModelWriter, "finish", late)
    result = run("prune", *small, "--save", "out", code=2)
    assert "out already exists" in result.stderr
    assert f"Note: {LAYERS} of {LAYERS} layers are finished and saved" in result.stderr
    assert tree(Path("out")) == tree(model)
    run("prune", *small, "--save", "out", "--force")
    assert tree(Path("out")) != tree(model)


def test_a_journal_or_a_shard_that_is_damaged(
    run: Run, small: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("prune", *small, "--save", "whole")
    lift = stop_after(monkeypatch, 2, KeyboardInterrupt())
    run("prune", *small, "--save", "out", code=130)
    lift()
    partial = tmp_path / ".out.partial"
    journal, shard = partial / "journal.json", sorted(partial.glob("model-*"))[-1]
    good, content = journal.read_text(), shard.read_bytes()
    for bad in ("", "[]", "null", "{}", good[:-9], good.replace('"zeros": ', '"zeros": 1'), "[" * 99_999):
        journal.write_text(bad)
        refused(run, "prune", *small, "--save", "out", code=2, says="journal.json", hint="--force")
    journal.write_text(good)
    shard.write_bytes(b"\xff" * len(content))
    assert f"resuming: 1 of {LAYERS} layers are finished" in run("prune", *small, "--save", "out").stderr
    assert tree(tmp_path / "out")["model.safetensors"] == tree(tmp_path / "whole")["model.safetensors"]
    with suppress(FileNotFoundError):
        shutil.rmtree(partial)


@pytest.mark.parametrize("way", WAYS)
def test_output_contains_what_the_run_reads(run: Run, small: Flags, text: Path, way: Flags) -> None:
    run("prune", *small, "--save", "out")
    for file in ("calibration.txt", "evaluation.txt"):
        shutil.copy(text, Path("out", file))
    says = f"{Path('out').resolve()} contains the calibration text (out/calibration.txt)"
    refused(
        run, "prune", *small, *way, "--dataset", "out/calibration.txt", "--force", code=2, says=says, hint="another"
    )
    says = f"{Path('out').resolve()} contains the evaluation text (out/evaluation.txt)"
    read = ["--eval", "--eval-dataset", "out/evaluation.txt"]
    refused(run, "prune", *small, *way, *read, "--force", code=2, says=says, hint="another")
