"""Statistics on disk: what is read is what was written, and nothing else is taken for statistics."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from layers import ragged, random_layer, random_row, same_bits, seeds
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from neuronrank_core import InputError, Recipe, document_statistics, load_statistics, merge, save_statistics
from neuronrank_core.statistics.table_files import FORMAT_VERSION

HEADER = {"model": "tiny", "text": "ä\n", "sampling": {"seqlen": 512, "seed": 0}, "nothing": None}


@given(seeds, ragged)
def test_round_trip_is_bit_equal(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    table = merge(random_row(rng, i, n, tokens_per_document=5) for i, n in enumerate(lengths))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        save_statistics(path, table, HEADER)
        loaded, header = load_statistics(path)
    assert same_bits(loaded, table)
    assert header == HEADER


def test_absent_columns_stay_absent(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    save_statistics(path, document_statistics(4, inputs={"q_proj": np.ones((3, 2))}))
    loaded, header = load_statistics(str(path))
    assert loaded.columns().keys() == {"document", "tokens", "input_mean_square.q_proj"}
    assert header == {}


def test_what_was_loaded_merges_with_what_was_collected(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one, two = random_row(rng, 2, 4), random_row(rng, 1, 7)
    save_statistics(tmp_path / "one", one)
    assert same_bits(merge([load_statistics(tmp_path / "one")[0], two]), merge([one, two]))


def write(path: Path, columns: dict, metadata: dict | None) -> Path:
    save_file(columns, str(path), metadata=metadata)
    return path


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    columns = random_layer().collect(Recipe()).columns()
    path = write(tmp_path / "new", columns, {"format": str(FORMAT_VERSION + 1), "header": "{}"})
    with pytest.raises(InputError, match="newer") as error:
        load_statistics(path)
    assert "upgrade" in error.value.hint


@pytest.mark.parametrize(
    ("columns", "metadata"),
    [
        ({"weight": np.ones(2)}, None),
        ({"weight": np.ones(2)}, {"format": "pt"}),
        ({"weight": np.ones(2)}, {"format": "1", "header": "{}"}),
        ({"document": np.array([0])}, {"format": "1", "header": "{}"}),
        ({"document": np.array([0]), "tokens": np.array([1, 2])}, {"format": "1", "header": "{}"}),
        ({"document": np.array([0]), "tokens": np.array([1])}, {"format": "1", "header": "{"}),
    ],
    ids=["no metadata", "a model", "unknown column", "column missing", "rows differ", "broken header"],
)
def test_other_tensors_are_refused(tmp_path: Path, columns: dict, metadata: dict | None) -> None:
    with pytest.raises(InputError, match="other"):
        load_statistics(write(tmp_path / "other", columns, metadata))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_types_that_numpy_does_not_have_are_refused(tmp_path: Path, dtype: str) -> None:
    save_torch({"tokens": torch.zeros(1).to(getattr(torch, dtype))}, tmp_path / "other", {"format": "1"})
    with pytest.raises(InputError, match="other"):
        load_statistics(tmp_path / "other")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x04pickle", b"\xff" * 64])
def test_junk_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "junk.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"junk\.safetensors"):
        load_statistics(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_statistics(path, random_layer().collect(Recipe()))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="cannot read"):
        load_statistics(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            load_statistics(path)
