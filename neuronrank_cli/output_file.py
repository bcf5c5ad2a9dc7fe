"""Checks the file that a command writes, before the work."""

import os
from pathlib import Path

from neuronrank_core import InputError
from neuronrank_torch.paths import local_path


def check_output_file(save: str, *, force: bool, example: str) -> Path:
    """The file to write.

    Raises
    ------
    InputError
        As :func:`check_writable`; or if it is a folder, or exists and ``force`` is not set.
    """
    file = check_writable(save)
    if file.is_dir():
        raise InputError(f"{save} is a folder", hint=f"name a file in it: --save {example}")
    if file.exists() and not force:
        raise InputError(f"{save} already exists", hint="choose another name, or replace it with --force")
    return file


def check_writable(save: str) -> Path:
    """The file to write, which may exist.

    Raises
    ------
    InputError
        If it is something else, such as a device, or its folder does not exist or must not be written to.
    """
    file = local_path(save)
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise InputError(f"{save} is not a regular file", hint="choose another name")
    folder = file.resolve().parent if file.is_symlink() else file.parent
    if not folder.is_dir():
        raise InputError(f"cannot write {save}: there is no folder {folder}", hint="create it, or choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {save}: {folder} is not writable", hint="choose another folder")
    return file
