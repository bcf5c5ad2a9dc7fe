"""JSON files, with and without a checksum."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronrank_core.errors import InputError
from neuronrank_torch.files.json import read_json, read_sealed, write_json

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
CONTENT = st.dictionaries(st.text(), st.recursive(LEAVES, st.lists, max_leaves=5))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json") / "file.json"


@given(CONTENT.filter(lambda content: "checksum" not in content))
def test_what_is_written_is_read(file: Path, content: dict[str, Any]) -> None:
    write_json(file, content)
    assert read_json(file) == content
    write_json(file, content, checksum=True)
    assert read_sealed(file, "") == content


def test_a_name_that_is_not_utf8_can_be_written(file: Path) -> None:
    """As the system's functions return it: with lone surrogates."""
    content = {"file": b"caf\xe9".decode("utf-8", errors="surrogateescape")}
    write_json(file, content, checksum=True)
    assert read_sealed(file, "") == content


@pytest.mark.parametrize("change", [{"a": 2}, {"b": 1}, {"checksum": "0"}, {"checksum": None}])
def test_an_edited_file_is_refused(file: Path, change: dict[str, Any]) -> None:
    write_json(file, {"a": 1}, checksum=True)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    message = f"cannot read {file}: it is damaged or was edited (checksum mismatch)"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$") as caught:
        read_sealed(file, "collect again")
    assert caught.value.hint == "collect again"


def test_a_file_of_an_earlier_version_is_read(file: Path) -> None:
    """Written without sorting, with escapes, without a newline."""
    checksum = "47cf6e7b86034be9d1f8867945f36940d565eb32fa89b7ed71f0a633d7f1298c"
    file.write_text('{"b": "\\u00e9", "a": [1, 2.5], "checksum": "' + checksum + '"}')
    assert read_sealed(file, "") == {"a": [1, 2.5], "b": "é"}


@pytest.mark.parametrize("content", [{"x": float("nan")}, {"x": object()}])
def test_what_is_not_json_leaves_the_file_alone(file: Path, content: dict[str, Any]) -> None:
    file.write_text("before")
    with pytest.raises((ValueError, TypeError)):
        write_json(file, content)
    assert file.read_text() == "before"
