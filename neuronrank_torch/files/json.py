"""JSON files, with a checksum where a file that was cut off, mixed up or edited must not be trusted."""

import hashlib
import json
from pathlib import Path
from typing import Any

from neuronrank_core.errors import InputError, first_line

_CHECKSUM = "checksum"


def write_json(file: Path, content: dict[str, Any], *, checksum: bool = False) -> None:
    """Write a JSON object: keys sorted, indented, in UTF-8.

    Parameters
    ----------
    file : pathlib.Path
    content : dict
        Strings as keys, no NaN.
    checksum : bool
        Whether to add a checksum, for :func:`read_sealed`.

    Raises
    ------
    ValueError, TypeError
        If the content cannot be written as JSON. Nothing is written.
    OSError
        If the file cannot be written.
    """
    stored = seal(content) if checksum else content
    text = json.dumps(stored, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    # UTF-8 cannot encode the lone surrogates of a file name that is not UTF-8; their escapes are JSON too.
    file.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(file: Path, hint: str = "download the model again") -> dict[str, Any]:
    """Read a JSON object; raises InputError, with this hint, if the file does not hold one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {file}: {first_line(error)}", hint=hint) from error
    if not isinstance(content, dict):
        raise InputError(f"cannot read {file}: not a JSON object", hint=hint)
    return content


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """The content with its checksum."""
    return {**content, _CHECKSUM: _digest(content)}


def read_sealed(file: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object that was written with a checksum, and check it.

    Parameters
    ----------
    file : pathlib.Path
    hint : str
        Hint of the error.

    Returns
    -------
    dict
        The content without its checksum.

    Raises
    ------
    InputError
        If the file cannot be read, is not a JSON object, or does not match its checksum.
    """
    sealed = read_json(file, hint)
    content = {name: value for name, value in sealed.items() if name != _CHECKSUM}
    if sealed.get(_CHECKSUM) != _digest(content):
        raise InputError(f"cannot read {file}: it is damaged or was edited (checksum mismatch)", hint=hint)
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
