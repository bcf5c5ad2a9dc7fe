"""While a layer is in use, the system is told to read the next one from disk."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer

from neuronrank_torch.model.open import open_model
from neuronrank_torch.model.streaming import HEAD, REST
from neuronrank_torch.model.weights import SafetensorsWeights

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise on this system")


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bytes that the system was told to read."""
    seen: list[bytes] = []

    def fadvise(descriptor: int, begin: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        seen.append(os.pread(descriptor, size, begin))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return seen


def test_the_bytes_of_just_those_tensors_are_named(tmp_path: Path, advised: list[bytes]) -> None:
    tensors = {f"t{i}": torch.arange(5.0) + 10 * i for i in range(4)}
    save_file({name: tensors[name] for name in ("t0", "t1")}, tmp_path / "a.safetensors")
    save_file({name: tensors[name] for name in ("t2", "t3")}, tmp_path / "b.safetensors")
    source = SafetensorsWeights([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    source.prefetch(["t1", "t2"])
    assert sorted(advised) == sorted(tensors[name].numpy().tobytes() for name in ("t1", "t2"))


def test_each_unit_announces_the_one_after_it(tmp_path: Path, advised: list[bytes]) -> None:
    tiny_model(layers=2, tied=False).save_pretrained(tmp_path)
    tiny_tokenizer(True).save_pretrained(tmp_path)
    weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    model, _, _ = open_model(str(tmp_path))
    order = (REST, 0, 1, HEAD)
    assert tuple(model.units) == order
    for unit, following in itertools.pairwise(order):
        if unit != REST:  # That one is brought when the model is opened.
            advised.clear()
            with model.resident(unit):
                pass
        assert sorted(advised) == sorted(weights[name] for name in model.units[following])
    advised.clear()
    with model.resident(HEAD):
        pass
    assert advised == []
