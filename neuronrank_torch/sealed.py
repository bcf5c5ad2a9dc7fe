"""JSON files with a checksum: what was cut, mixed up or edited by hand is found before it is believed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from neuronrank_core.errors import InputError
from neuronrank_torch.model_files import read_json

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
