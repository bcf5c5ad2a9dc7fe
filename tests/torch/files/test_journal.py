"""The journal of a run: loaded by the same run, refused by another, with the differences in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from neuronrank_core.errors import InputError
from neuronrank_torch.files.journal import Journal


def test_everything_recorded_is_loaded(tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    shard.write_bytes(b"123")
    written = Journal(tmp_path / "journal", {"seed": 0, "range": (1, 2)})
    written.finish(shard, {"zeros": 5})
    written.measure("before", {"perplexity": 12.345678901234567})
    written.allocate([0.1, 0.30000000000000004])
    loaded = Journal(tmp_path / "journal", {"range": [1, 2], "seed": 0})
    assert (loaded.shards, loaded.reports) == ({"shard": 3}, {"shard": {"zeros": 5}})
    assert (loaded.measured, loaded.ratios) == (written.measured, written.ratios)


def test_differences_are_named_in_the_order_of_this_run(tmp_path: Path) -> None:
    Journal(tmp_path / "journal", {"ratio": 0.5, "file": {"a": 1, "old": 2}}).allocate([])
    says = "differs from this one: ratio was 0.5, is 0.6; file new was absent, is 3; file old was 2, is absent"
    with pytest.raises(InputError, match=re.escape(says) + "$") as caught:
        Journal(tmp_path / "journal", {"ratio": 0.6, "file": {"a": 1, "new": 3}})
    assert caught.value.hint == "repeat its command to resume it, or discard it with --force"
