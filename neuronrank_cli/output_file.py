"""Checks the file that a command writes, before the work."""

from pathlib import Path

from neuronrank_core import InputError


def check_output_file(save: str, *, force: bool, example: str) -> Path:
    """The file to write.

    Raises
    ------
    InputError
        If it is a folder, exists and ``force`` is not set, or its folder does not exist.
    """
    file = Path(save).expanduser()
    if file.is_dir():
        raise InputError(f"{save} is a folder", hint=f"name a file in it: --save {example}")
    if file.exists() and not force:
        raise InputError(f"{save} already exists", hint="choose another name, or replace it with --force")
    if not file.parent.is_dir():
        raise InputError(f"cannot write {save}: there is no folder {file.parent}", hint="create it, or choose another")
    return file
