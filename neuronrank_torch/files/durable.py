"""The output folder: which folders may be replaced, and how a finished one gets its name, as a whole or not at all."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from neuronrank_core.errors import InputError
from neuronrank_torch.paths import local_path


@dataclass(frozen=True)
class Kind:
    """A kind of output folder: what it is called in errors, and the file that identifies it."""

    name: str
    header: str


MODEL = Kind("a saved model", "config.json")
STATISTICS = Kind("a statistics folder", "statistics.json")


def check_output(
    path: str | Path, force: bool = False, kind: Kind = MODEL, *, source: Path | None = None, label: str = ""
) -> Path:
    """Refuse an output folder that cannot or must not be written. Fast enough to call before the long work.

    Parameters
    ----------
    path : str or pathlib.Path
        The output folder.
    force : bool
        Whether an existing folder of this kind may be replaced.
    kind : Kind
        Kind of the output.
    source : pathlib.Path, optional
        Folder or file of the input model, which is never overwritten.
    label : str
        Name of the input model in errors.

    Returns
    -------
    pathlib.Path
        The output folder, absolute, with symbolic links resolved.

    Raises
    ------
    InputError
        If the folder cannot be created, contains the input model, or exists and must not be replaced.
    """
    target = local_path(path).resolve()
    if source is not None and source.resolve().is_relative_to(target):
        raise InputError(f"{target} contains the input model ({label})", hint="choose another output folder")
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
            f"{target} is not {kind.name}, or has subfolders, so even --force does not delete it",
            hint="choose another output folder",
        )


def write_durably(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file as a whole or not at all: under a temporary name first, renamed when it is on disk.

    Parameters
    ----------
    file : pathlib.Path
        If it is a symbolic link, the file that it points to.
    write : callable
        Called with the temporary path. Whatever it raises is passed on.

    Raises
    ------
    OSError
        If the file cannot be flushed or renamed.
    """
    file = file.resolve()
    temporary = file.with_name(file.name + ".tmp")
    try:
        write(temporary)
        _flush(temporary)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(file.parent)


def lock_beside(file: Path) -> FileLock:
    """A lock for a file that several processes write, as a hidden file beside it."""
    file = file.resolve()  # One lock, whatever links lead to the file.
    return FileLock(file.with_name(f".{file.name}.lock"))


def flush_folder(folder: Path, reference: Path) -> None:
    """Give every file in a folder the permissions of ``reference``, and flush all of them to disk."""
    # safetensors creates files that only their owner can read.
    mode = reference.stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)
        _flush(file)
    _flush(folder)


def _flush(path: Path) -> None:
    if os.name != "posix":  # Windows cannot flush a folder, nor a file that is open for reading.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems cannot flush a folder. A file that cannot be flushed may not be on disk.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def rename_into_place(temporary: Path, target: Path) -> None:
    """Rename a finished folder to its final name. The folder that it replaces is deleted last."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    with ExitStack() as undo:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            undo.callback(old.rename, target)
        temporary.rename(target)
        undo.pop_all()
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)
