"""Paths as users name them."""

import os
from contextlib import suppress
from pathlib import Path

from neuronrank_core.errors import InputError


def local_path(name: str | Path) -> Path:
    """The path of a name, with ``~`` expanded; raises InputError if no file can have it."""
    try:
        path = Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except RuntimeError as error:  # ~USER without such a user.
        raise InputError(f"cannot find {name}: {error}", hint="check the path") from error
    except OSError as error:  # A name that is too long, or a folder that must not be read.
        if os.name == "nt":  # There, names on the hub have characters that no path can have.
            return path
        raise InputError(f"cannot use {name}: {error.strerror}", hint="check the path") from error
    return path
