"""Saving a model as an ordinary Hugging Face folder: all of it or nothing."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from neuronrank_core.errors import InputError, NeuronRankError
from neuronrank_torch.models import ModelSource, quiet_transformers

REPORT_NAME = "neuronrank.json"


def check_output(path: str | Path, source: ModelSource | None = None, force: bool = False) -> Path:
    """Refuse an output folder that cannot or should not be written; cheap, for before the long work.

    Parameters
    ----------
    path : str or pathlib.Path
        The output folder.
    source : ModelSource, optional
        Where the model came from. That place is never overwritten.
    force : bool
        Whether an existing model may be replaced.

    Returns
    -------
    pathlib.Path
        The output folder, absolute, with symbolic links resolved.

    Raises
    ------
    InputError
        If the folder exists and ``force`` is not given or it is not a saved model, holds the source, or cannot be
        created.
    """
    target = Path(path).expanduser().resolve()
    if source is not None and source.path.resolve().is_relative_to(target):
        raise InputError(f"{target} holds the model that is read ({source.spec})", hint="choose another output folder")
    if target.exists():
        _check_replaceable(target, force)
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise InputError(f"cannot create {target}: {parent} is not a folder", hint="choose another output folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot create {target}: {parent} is not writable", hint="choose another output folder")
    return target


def save_model(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    report: dict[str, Any],
    force: bool = False,
    source: ModelSource | None = None,
) -> Path:
    """Save a model, its tokenizer and a report as one Hugging Face folder.

    Everything is written under a temporary name beside the output and renamed at the end. On any failure the
    temporary folder is removed, and what was under the output's name, if anything, is as it was.

    Parameters
    ----------
    model, tokenizer : transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
        Saved as they are: dtype and tied weights are kept.
    path : str or pathlib.Path
        The output folder. Missing parents are created.
    report : dict
        What was done, for ``neuronrank.json``. Must be JSON: strings as keys, no NaN.
    force : bool
        Replace an existing model.
    source : ModelSource, optional
        Where the model came from: where that was sharded, shards of the same size are written.

    Returns
    -------
    pathlib.Path
        The output folder, absolute.

    Raises
    ------
    InputError
        As :func:`check_output`.
    NeuronRankError
        If writing fails.
    """
    target = check_output(path, source, force)
    text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    shard_bytes = sys.maxsize if source is None or source.shard_bytes is None else source.shard_bytes
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Process numbers come round again, in containers at every start: this can only be a killed run's.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with quiet_transformers():
            model.save_pretrained(temporary, max_shard_size=shard_bytes)
            tokenizer.save_pretrained(temporary)
        (temporary / REPORT_NAME).write_text(text, encoding="utf-8")
        _settle(temporary)
        _move_in(temporary, target)
    except (OSError, SafetensorError) as error:
        raise NeuronRankError(
            f"could not save to {target}: {error}", hint="check free space and permissions; nothing was changed there"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _check_replaceable(target: Path, force: bool) -> None:
    if not target.is_dir():
        raise InputError(f"{target} is a file", hint="choose another output folder")
    if not force:
        raise InputError(f"{target} already exists", hint="choose another output folder, or replace it with --force")
    entries = list(target.iterdir())
    names = {entry.name for entry in entries}
    weights = any(entry.suffix == ".safetensors" for entry in entries)
    subfolders = any(entry.is_dir() for entry in entries)
    if names and ("config.json" not in names or not weights or subfolders):
        raise InputError(
            f"{target} is not a saved model (or holds more than one), so even --force does not delete it",
            hint="choose another output folder",
        )


def _settle(folder: Path) -> None:
    """Give every file the permissions of an ordinary new file, and have them all on disk before the rename."""
    # safetensors creates its files readable by their owner alone.
    mode = (folder / REPORT_NAME).stat().st_mode
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


def _move_in(temporary: Path, target: Path) -> None:
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
