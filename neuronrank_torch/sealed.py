"""JSON files with a checksum: what was cut, mixed up or edited by hand is found before it is believed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_SEAL = "checksum"


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """The content with its checksum, to be written as JSON."""
    return {**content, _SEAL: _checksum(content)}


def unseal(sealed: Any) -> dict[str, Any]:
    """The content without its checksum; raises ValueError if it is not what was sealed."""
    if not isinstance(sealed, dict):
        raise ValueError("not a JSON object")
    content = {name: value for name, value in sealed.items() if name != _SEAL}
    if sealed.get(_SEAL) != _checksum(content):
        raise ValueError("it is damaged, or was edited: its checksum does not fit")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
