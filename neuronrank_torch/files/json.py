"""JSON files, with a checksum where what was cut, mixed up or edited by hand must not be believed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from neuronrank_core.errors import InputError, first_line

_SEAL = "checksum"


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """The content with its checksum, to be written as JSON."""
    return {**content, _SEAL: _checksum(content)}


def read_sealed(file: Path, hint: str) -> dict[str, Any]:
    """Read what was sealed, without its checksum; raises InputError, with this hint, if it is not that."""
    sealed = read_json(file, hint)
    content = {name: value for name, value in sealed.items() if name != _SEAL}
    if sealed.get(_SEAL) != _checksum(content):
        raise InputError(f"cannot read {file}: it is damaged, or was edited: its checksum does not fit", hint=hint)
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(file: Path, hint: str = "download the model again") -> dict[str, Any]:
    """Read a JSON object; raises InputError, with this hint, where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {file}: {first_line(error)}", hint=hint) from error
    if not isinstance(content, dict):
        raise InputError(f"cannot read {file}: not a JSON object", hint=hint)
    return content
