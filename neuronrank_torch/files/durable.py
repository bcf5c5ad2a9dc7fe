"""The output folder: what may be written over, and how a finished one takes its name: all of it or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neuronrank_core.errors import InputError


@dataclass(frozen=True)
class Kind:
    """What a folder holds, and the file by which it is known."""

    name: str
    header: str


MODEL = Kind("a saved model", "config.json")
STATISTICS = Kind("a statistics folder", "statistics.json")


def check_output(
    path: str | Path,
    force: bool = False,
    kind: Kind = MODEL,
    *,
    source: Path | None = None,
    label: str = "",
) -> Path:
    """Refuse an output folder that cannot or should not be written; cheap, for before the long work.

    Parameters
    ----------
    path : str or pathlib.Path
        The output folder.
    force : bool
        Whether an existing folder of this kind may be replaced.
    kind : Kind
        What will be written.
    source : pathlib.Path, optional
        Where the model is read from. That place is never overwritten.
    label : str
        What errors call that place.

    Returns
    -------
    pathlib.Path
        The output folder, absolute, with symbolic links resolved.

    Raises
    ------
    InputError
        If the folder exists and ``force`` is not given or it is not of this kind, holds the source, or cannot be
        created.
    """
    target = Path(path).expanduser().resolve()
    if source is not None and source.resolve().is_relative_to(target):
        raise InputError(f"{target} holds the model that is read ({label})", hint="choose another output folder")
    if target.exists():
        _check_replaceable(target, force, kind)
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise InputError(f"cannot create {target}: {parent} is not a folder", hint="choose another output folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot create {target}: {parent} is not writable", hint="choose another output folder")
    return target


def _check_replaceable(target: Path, force: bool, kind: Kind) -> None:
    if not target.is_dir():
        raise InputError(f"{target} is a file", hint="choose another output folder")
    if not force:
        raise InputError(f"{target} already exists", hint="choose another output folder, or replace it with --force")
    entries = list(target.iterdir())
    names = {entry.name for entry in entries}
    weights = any(entry.suffix == ".safetensors" for entry in entries)
    subfolders = any(entry.is_dir() for entry in entries)
    if names and (kind.header not in names or not weights or subfolders):
        raise InputError(
            f"{target} is not {kind.name} (or holds more than one), so even --force does not delete it",
            hint="choose another output folder",
        )


def write_durably(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it when it is on disk: it is there as a whole or not at all.

    Parameters
    ----------
    file : pathlib.Path
    write : callable
        Called with the path to write to.
    """
    temporary = file.with_name(file.name + ".tmp")
    write(temporary)
    _flush(temporary)
    temporary.replace(file)
    _flush(file.parent)


def settle(folder: Path, plain: Path) -> None:
    """Give every file in a folder the permissions of a plain one there, and have them all on disk."""
    # safetensors creates its files readable by their owner alone.
    mode = plain.stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)
        _flush(file)
    _flush(folder)


def _flush(path: Path) -> None:
    if os.name != "posix":  # Elsewhere neither a folder nor a file opened to read can be flushed.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems cannot flush a folder; a file that cannot be flushed is not saved.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def move_in(temporary: Path, target: Path) -> None:
    """Rename the finished folder to its final name; a folder it replaces is deleted last."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    replacing = target.exists()
    if replacing:
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        if replacing:
            old.rename(target)
        raise
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)
