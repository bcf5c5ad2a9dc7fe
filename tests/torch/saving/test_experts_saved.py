"""Models with experts, from disk to disk: the bits of the run in memory, in the layout that they came in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixture import MOE, mixture
from pruning import TEXT, recipe, same_state
from tiny import tiny_tokenizer
from tiny_files import logits
from transformers import AutoModelForCausalLM

from neuronrank_torch import prune
from neuronrank_torch.model.converted import ConvertedWeights
from neuronrank_torch.model.open import load_model, open_model
from neuronrank_torch.model.weights import LoadedWeights, SafetensorsWeights
from neuronrank_torch.pruning import layer as pruning_layer
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.prune import run_prune
from neuronrank_torch.saving import model_writer

RECIPE = recipe(nsamples=3, include_attention=True)
LAYERS = 2


def write(folder: Path, family: str, **options: Any) -> Path:
    mixture(family, layers=LAYERS, tied=False).save_pretrained(folder, **options)
    tiny_tokenizer(True).save_pretrained(folder)
    return folder


def job(source: Path) -> Job:
    text = source.with_name("text.txt")
    text.write_text(TEXT)
    return Job(str(source), str(text), save=str(source.with_name("out")))


def names(folder: Path) -> set[str]:
    return set(SafetensorsWeights(folder.glob("*.safetensors")).shapes())


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("layout", [{}, {"save_original_format": False}, {"max_shard_size": "30KB"}])
def test_streamed_is_in_memory(
    tmp_path: Path, family: str, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "max_shard_size" in layout:
        monkeypatch.setattr(model_writer, "SINGLE_FILE_BYTES", 0)
    source = write(tmp_path / "source", family, **layout)
    report = run_prune(job(source), RECIPE)
    model, tokenizer, _ = load_model(str(source))
    expected = prune(model, tokenizer, RECIPE, TEXT)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_state(plain.state_dict(), model.state_dict())
    assert torch.equal(logits(plain), logits(model))
    assert names(tmp_path / "out") == names(source)
    assert report.notes == expected.notes
    assert report.total.zeros == expected.total.zeros > 0


@pytest.mark.parametrize("family", MOE)
def test_experts_one_by_one_need_not_be_in_memory_together(tmp_path: Path, family: str) -> None:
    model, _, _ = open_model(str(write(tmp_path / "source", family)))
    assert isinstance(model.source, ConvertedWeights)
    loaded = load_model(str(tmp_path / "source"))[0].state_dict()
    assert all(torch.equal(model.source.tensor(name), tensor) for name, tensor in loaded.items())


def test_an_expert_that_is_missing_is_found_missing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = write(tmp_path / "source", "mixtral")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"layers\.1|cannot load|lacks"):
        open_model(str(source))


def test_a_run_that_was_cut_off_goes_on_with_its_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning_layer, "MINIMUM_TOKENS", 30)
    source = write(tmp_path / "source", "qwen3_moe")
    whole = run_prune(job(source), RECIPE)
    expected = load_model(str(tmp_path / "out"))[0].state_dict()
    again = write(tmp_path / "again" / "source", "qwen3_moe")

    def cut(stage: str, *_: int) -> None:
        if stage == f"calibrating layer {LAYERS} of {LAYERS}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_prune(job(again), RECIPE, cut)
    stages: list[str] = []
    report = run_prune(job(again), RECIPE, lambda stage, *_: stages.append(stage))
    assert any(stage.startswith("resuming: 1 of") for stage in stages)
    assert same_state(load_model(str(again.with_name("out")))[0].state_dict(), expected)
    assert report.notes == whole.notes
    assert any("layer 0" in note for note in report.notes)


def test_a_model_that_needs_no_putting_together_is_not_loaded_whole(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "mixtral", save_original_format=False)
    assert not isinstance(open_model(str(source))[0].source, LoadedWeights)
