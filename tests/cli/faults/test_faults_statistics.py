"""Rows of docs/faults.md: statistics that belong to something else, are damaged, or come from a newer version."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command import Run, stop_after
from faults import refused
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import tiny_model
from tiny_files import write_model

Flags = list[object]
WAYS = [["--save", "out"], ["--eval"], ["--save", "out", "--dry-run"]]


@pytest.fixture
def stats(run: Run, small: Flags) -> Path:
    run("collect", *small, "--save", "stats")
    return Path("stats")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("stats")
def test_of_another_model(run: Run, small: Flags, way: Flags) -> None:
    write_model("other", tiny_model(layers=4, hidden=32, intermediate=64, seed=1))
    says = "stats holds statistics of another model ("
    arguments = [*small, "--model", "other", "--stats", "stats", *way]
    refused(run, "prune", *arguments, code=2, says=says, hint="collect statistics of this model")


def test_of_other_text(run: Run, small: Flags) -> None:
    Path("other.txt").write_text("Quite another text. " * 99)
    run("collect", *small, "--dataset", "other.txt", "--documents", "2:4", "--batch-size", 2, "--save", "b")
    run("collect", *small, "--documents", "0:2", "--batch-size", 2, "--save", "a")
    says = "a and b cannot be merged: text_sha256 was "
    refused(run, "merge", "a", "b", "--save", "both", code=2, says=says, hint="one model, text and sampling")


def test_of_other_text_than_those_of_a_run_that_was_cut_off(
    run: Run, small: Flags, stats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["prune", "--model", small[1], "--stats", stats, "--save", "out"]
    lift = stop_after(monkeypatch, 2, KeyboardInterrupt())
    run(*arguments, code=130)
    lift()
    shutil.rmtree(stats)
    Path("other.txt").write_text("Quite another text. " * 99)
    run("collect", *small, "--dataset", "other.txt", "--save", "stats")
    says = "an unfinished run for this output differs from this one: statistics "
    refused(run, *arguments, code=2, says=says, hint="--force")


def test_that_share_documents(run: Run, stats: Path) -> None:
    shutil.copytree(stats, "twin")
    says = "the folders share documents, such as 0"
    refused(run, "merge", "stats", "twin", "--save", "both", code=2, says=says, hint="disjoint")


def _header(folder: Path, **changes: object) -> None:
    file = folder / "statistics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _without(folder: Path, key: str) -> None:
    file = folder / "statistics.json"
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))


def _newer(folder: Path) -> None:
    file = folder / "layer-00002.safetensors"
    with safe_open(file, framework="np") as content:
        columns = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        metadata = content.metadata()
    save_file(columns, file, metadata={**metadata, "format": "99"})


def _shorter(folder: Path) -> None:
    file = folder / "layer-00002.safetensors"
    with safe_open(file, framework="np") as content:
        columns = {name: content.get_tensor(name)[:-1] for name in content.keys()}  # noqa: SIM118
        metadata = content.metadata()
    columns["sample_tokens"] = columns["sample_tokens"] * 0
    columns["sample"] = np.ascontiguousarray(columns["sample"][:0])
    save_file(columns, file, metadata=metadata)


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "not there": (lambda d: shutil.rmtree(d), "is not a statistics folder", "neuronrank collect"),
    "a model": (lambda d: (d / "statistics.json").rename(d / "config.json"), "not a statistics folder", "collect"),
    "newer": (lambda d: _header(d, format=99), "stats has format 99, newer than", "upgrade neuronrank"),
    "newer table": (_newer, "its format 99 is newer than", "upgrade neuronrank"),
    "header cut": (lambda d: os.truncate(d / "statistics.json", 99), "cannot read stats/statistics.json", "collect"),
    "header of nothing": (lambda d: (d / "statistics.json").write_text("{}"), "cannot read stats/stat", "collect"),
    "header a list": (lambda d: (d / "statistics.json").write_text("[1]"), "cannot read stats/stat", "collect"),
    **{
        f"without {key}": (lambda d, key=key: _without(d, key), "stats/statistics.json", "collect")
        for key in ("layers", "fingerprint", "documents", "signal", "seqlen", "text_sha256", "model")
    },
    "other type": (lambda d: _header(d, documents="many"), "cannot read stats/statistics.json", "collect"),
    "table gone": (lambda d: (d / "layer-00002.safetensors").unlink(), "layer-00002", "collect"),
    "table cut": (lambda d: os.truncate(d / "layer-00002.safetensors", 900), "layer-00002", "collect"),
    "fewer documents": (_shorter, "layer-00002.safetensors does not match the documents", "collect"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged(run: Run, small: Flags, stats: Path, damage: str) -> None:
    act, says, hint = DAMAGE[damage]
    act(stats)
    arguments = ["--model", small[1], "--prune_method", "neuronrank_tfidf", "--stats", "stats", "--eval"]
    refused(run, "prune", *arguments, code=2, says=says, hint=hint)


@pytest.mark.usefixtures("stats")
def test_topics_are_limited_by_the_tokens_of_the_statistics(run: Run, small: Flags) -> None:
    topics = ["--prune_method", "neuronrank_tfidf", "--nr-tfidf-mode", "topic", "--nsamples", 1, "--nr-tfidf-k"]
    arguments = ["prune", *small, "--stats", "stats", "--dry-run", *topics]
    run(*arguments, 128)  # 4 documents of 32 tokens, whatever --nsamples says.
    refused(run, *arguments, 129, code=2, says="tfidf-k is 129, allowed: [1, 128]")


@pytest.mark.parametrize("way", WAYS)
def test_ratios_need_a_document_with_a_gain(run: Run, small: Flags, way: Flags) -> None:
    run("collect", *small, "--batch-size", 1, "--documents", "1:4", "--save", "some")
    arguments = ["prune", *small, "--stats", "some", "--allocate", "neuronrank", *way]
    refused(run, *arguments, code=2, says="error_gain was measured in none of the documents", hint="merge them")
