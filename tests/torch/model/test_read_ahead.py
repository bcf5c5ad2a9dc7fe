"""The next layer is read in a thread while one is at work; here on the CPU, where the copy itself is not early."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import TEXT
from tiny import tiny_model, tiny_tokenizer
from tiny_files import write_model
from torch import Tensor
from transformers.core_model_loading import WeightConverter

from neuronrank_core import Recipe
from neuronrank_torch import Evaluation, Job, run_prune
from neuronrank_torch.model import streaming
from neuronrank_torch.model.open import load_model, open_model
from neuronrank_torch.model.read_ahead import ReadAhead
from neuronrank_torch.model.streaming import HEAD, StreamedModel
from neuronrank_torch.runs.dry_run import estimate_memory

CPU = torch.device("cpu")


@pytest.fixture
def spec(tmp_path: Path) -> str:
    tiny_model(layers=3, tied=False).save_pretrained(tmp_path)
    tiny_tokenizer(True).save_pretrained(tmp_path)
    return str(tmp_path)


def opened(spec: str, monkeypatch: pytest.MonkeyPatch) -> tuple[StreamedModel, list[tuple[str, bool]]]:
    """A model that reads ahead, and each name that is read, with whether the main thread does it."""
    model, _, _ = open_model(spec, dtype="bfloat16")
    model.read_ahead, reads, read = ReadAhead(CPU), [], model.source.tensor

    def noted(name: str) -> Tensor:
        reads.append((name, threading.current_thread() is threading.main_thread()))
        return read(name)

    monkeypatch.setattr(model.source, "tensor", noted)
    return model, reads


def test_layers_have_their_weights_and_each_is_read_once(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = opened(spec, monkeypatch)
    whole = dict(load_model(spec, dtype="bfloat16")[0].named_parameters())
    for unit in (0, 1, 2, HEAD):
        with model.resident(unit):
            for name, tensor in model.tensors(unit).items():
                assert tensor.dtype == torch.bfloat16
                assert torch.equal(tensor, whole[name])
    assert sorted(name for name, _ in reads) == sorted(n for unit in (0, 1, 2, HEAD) for n in model.units[unit])
    # Nothing announced layer 0, and the head is not read early.
    late = {name for name, main in reads if main}
    assert late == {*model.units[0], *model.units[HEAD]}


def test_another_order_and_another_source_get_their_own_weights(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = opened(spec, monkeypatch)
    whole = dict(load_model(spec, dtype="bfloat16")[0].named_parameters())
    for unit in (0, 2, 0, 1):
        with model.resident(unit):
            assert all(torch.equal(tensor, whole[name]) for name, tensor in model.tensors(unit).items())
    with model.resident(2, lambda name: torch.full_like(whole[name], 7)):
        assert all((tensor == 7).all() for tensor in model.tensors(2).values())


def test_an_error_of_the_thread_is_raised_when_its_layer_is_used() -> None:
    ahead = ReadAhead(CPU)

    def read(name: str) -> Tensor:
        raise OSError(5, name)

    ahead.start(1, {"a": torch.float32}, read)
    with pytest.raises(OSError, match="a"):
        ahead.take(1)
    assert ahead.take(1) == {}


def test_without_room_the_layer_is_read_in_its_turn() -> None:
    ahead = ReadAhead(CPU)

    def read(name: str) -> Tensor:
        raise torch.cuda.OutOfMemoryError(f"CUDA out of memory: {name}")

    ahead.start(1, {"a": torch.float32}, read)
    assert ahead.take(1) == {}


def test_what_was_read_shares_no_memory_with_its_source() -> None:
    ahead, stored = ReadAhead(CPU), torch.ones(3)
    ahead.start(1, {"a": torch.float32}, lambda name: stored)
    ahead.take(1)["a"].zero_()
    assert stored.tolist() == [1, 1, 1]


def test_a_conversion_may_begin_while_another_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("mixtral", layers=2, hidden=32, intermediate=48).save_pretrained(tmp_path)
    tiny_tokenizer(True).save_pretrained(tmp_path)
    model, _, _ = open_model(str(tmp_path))
    names = [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)]
    alone = {name: model.source.tensor(name) for name in names}
    convert, inside = WeightConverter.convert, []

    def interrupted(self: WeightConverter, *args: Any, **kwargs: Any) -> Any:
        if not inside:
            inside.append(True)
            inside.append(model.source.tensor(names[1]))
        return convert(self, *args, **kwargs)

    monkeypatch.setattr(WeightConverter, "convert", interrupted)
    assert torch.equal(model.source.tensor(names[0]), alone[names[0]])
    assert torch.equal(inside[1], alone[names[1]])


def test_the_estimate_counts_the_layer_that_is_read_early(spec: str) -> None:
    model, _, _ = open_model(spec)
    recipe, job = Recipe(nsamples=2, seqlen=16), Job(model=spec, save="out")
    without = estimate_memory(model, recipe, job, 0, whole=False, twice=False)
    model.read_ahead = ReadAhead(CPU)
    assert estimate_memory(model, recipe, job, 0, whole=False, twice=False) == {**without, "layers": 2 * model.bytes(0)}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_run_that_reads_ahead_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Any
) -> None:
    source = write_model(tmp_path / "source", tiny_model(family, layers=3, hidden=32, intermediate=48, tied=False))
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    taken: list[object] = []
    take = ReadAhead.take
    monkeypatch.setattr(ReadAhead, "take", lambda self, unit: (found := take(self, unit), taken.append(bool(found)))[0])
    written = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(streaming, "READS_AHEAD", devices)
        save = tmp_path / f"out{len(devices)}"
        evaluation = Evaluation(str(tmp_path / "text"), seqlen=32, windows=3)
        run_prune(
            Job(str(source), str(tmp_path / "text"), str(save), device="cpu", evaluation=evaluation),
            Recipe(nsamples=3, seqlen=32),
        )
        written.append((save / "model.safetensors").read_bytes())
    assert written[0] == written[1]
    # Three layers are pruned, then run dense and pruned; only the first of a pass may be read when it is needed.
    assert taken.count(True) >= 5
