"""Collections of disjoint documents, merged: every byte of one collection of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pruning import TEXT
from tiny import tiny_model
from tiny_files import write_model

from neuronrank_core import InputError, InvalidValueError, Recipe
from neuronrank_torch.runs.collect import run_collect
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.merge import run_merge

SAMPLING = {"nsamples": 7, "seqlen": 32, "tokens_per_document": 16}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, seed in (("model", 0), ("other", 1)):
        write_model(tmp_path / name, tiny_model(layers=2, hidden=32, intermediate=64, tied=False, seed=seed))
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "other-text").write_text(TEXT[1:])
    return tmp_path / "model"


def collect(source: Path, name: str, documents: Any = None, **chosen: Any) -> str:
    folder = source.parent
    job = Job(
        str(folder / chosen.pop("model", "model")),
        str(folder / chosen.pop("text", "text")),
        save=str(folder / name),
        batch_size=chosen.pop("batch_size", 2),
        dtype=chosen.pop("dtype", "auto"),
    )
    run_collect(job, Recipe(**{**SAMPLING, **chosen}), documents)
    return str(folder / name)


def content(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_merged_is_collected_at_once_byte_by_byte(source: Path, order: tuple[int, ...]) -> None:
    parts = [collect(source, f"part{i}", range_) for i, range_ in enumerate([(0, 2), (2, 4), (4, 7)])]
    merged, again = str(source.with_name("merged")), str(source.with_name("again"))
    run_merge([parts[i] for i in order], merged)
    whole = content(collect(source, "whole"))
    assert content(merged) == whole
    assert sorted(whole) == [
        "layer-00000.safetensors",
        "layer-00001.safetensors",
        "lm_head.safetensors",
        "statistics.json",
    ]
    run_merge([parts[0], parts[1]], again)
    run_merge([again, parts[2]], merged, force=True)
    assert content(merged) == whole
    assert not list(source.parent.glob(".*"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"documents": (2, 6)}, "share documents, such as 2"),
        ({"model": "other"}, "fingerprint model.safetensors was"),
        ({"text": "other-text"}, "text_sha256 was"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"nsamples": 8}, "nsamples was 7, is 8"),
        ({"signal": "product"}, "signal was gate, is product"),
        ({"threshold": 0.5}, "threshold was 0.0, is 0.5"),
        ({"tokens_per_document": 8}, "tokens_per_document was 16, is 8"),
        ({"batch_size": 1}, "batch_size was 2, is 1"),
        ({"dtype": "bfloat16"}, "dtype was float32, is bfloat16"),
    ],
)
def test_what_does_not_belong_together_is_refused(source: Path, changed: dict[str, Any], message: str) -> None:
    parts = [collect(source, "one", (0, 4)), collect(source, "two", **{"documents": (4, 6), **changed})]
    with pytest.raises(InputError) as error:
        run_merge(parts, str(source.with_name("merged")))
    assert message in str(error.value)
    assert error.value.hint
    assert not source.with_name("merged").exists()


def test_a_folder_is_not_merged_into_itself(source: Path) -> None:
    part = collect(source, "one")
    before = content(part)
    with pytest.raises(InputError, match="one of the folders to merge"):
        run_merge([part], part, force=True)
    assert content(part) == before


@pytest.mark.parametrize("documents", [(0, 8), (4, 4), (5, 3), (1, 4), (0, 3)])
def test_documents_that_cannot_be_collected_apart(source: Path, documents: tuple[int, int]) -> None:
    with pytest.raises(InvalidValueError, match="documents is"):
        collect(source, "part", documents)
    assert not source.with_name("part").exists()
