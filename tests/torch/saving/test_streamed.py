"""A model pruned from disk, one layer at a time, equals the model pruned in memory, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import TEXT, recipe, same_state
from tiny import tiny_model, tiny_tokenizer
from tiny_files import write_gguf
from torch import Tensor, nn

from neuronrank_torch import prune
from neuronrank_torch.calibration import hidden_states
from neuronrank_torch.calibration.layerwise import LayerRun
from neuronrank_torch.model.open import load_model, open_model
from neuronrank_torch.model.streaming import REST, StreamedModel
from neuronrank_torch.model.weights import LoadedWeights, SafetensorsWeights
from neuronrank_torch.pruning.sparsity_types.neurons import Neurons
from neuronrank_torch.pruning.sparsity_types.weights import Weights
from neuronrank_torch.runs.job import Evaluation, Job
from neuronrank_torch.runs.prune import run_prune
from neuronrank_torch.saving import model_writer

LAYERS = 3
RECIPES: dict[str, dict[str, Any]] = {
    "unstructured": {},
    "2:4": {"sparsity_type": "2:4"},
    "neurons": {"sparsity_type": "neurons", "sparsity_ratio": 0.25},
    "neurons and update": {"sparsity_type": "neurons", "sparsity_ratio": 0.25, "update": "least-squares"},
    "heads": {"sparsity_type": "heads"},
    "heads and update": {"sparsity_type": "query-heads", "update": "least-squares"},
    "heads by magnitude": {"sparsity_type": "heads", "method": "magnitude"},
    "update": {"update": "least-squares", "include_attention": True},
    "attention": {"include_attention": True},
    "dense": {"propagate": "dense"},
    "gradual update": {"update": "gradual"},
    "dense and update": {"propagate": "dense", "update": "least-squares"},
    "last": {"pruning_last": 1},
    "allocated": {"allocate": "neuronrank"},
    "last allocated": {"allocate": "neuronrank", "pruning_last": 2, "propagate": "dense"},
    "magnitude": {"method": "magnitude", "pruning_last": 2},
    "topics": {"method": "neuronrank_tfidf", "tfidf_mode": "topic"},
    "head": {"prune_lm_head": True},
    "head by magnitude": {"prune_lm_head": True, "method": "magnitude"},
}


def small(**options: Any) -> nn.Module:
    return tiny_model(**{"layers": LAYERS, "hidden": 32, "intermediate": 64, "tied": False, **options})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", small())


def write(folder: Path, model: nn.Module, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tiny_tokenizer(True).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def saved(source: Path, text: str, **chosen: Any) -> dict[str, Tensor]:
    """Prune from disk to disk, and load what plain transformers finds there."""
    job = {name: chosen.pop(name) for name in ("dtype", "hidden_states", "batch_size") if name in chosen}
    out = source.with_name("out")
    run_prune(Job(str(source), text, save=str(out), **job), recipe(**chosen))
    return load_model(str(out))[0].state_dict()


def in_memory(source: Path, dtype: Any = "auto", batch_size: int | None = None, **chosen: Any) -> dict[str, Tensor]:
    model, tokenizer, _ = load_model(str(source), dtype=dtype)
    prune(model, tokenizer, recipe(**chosen), TEXT, batch_size=batch_size)
    return model.state_dict()


@pytest.mark.parametrize("chosen", RECIPES)
def test_every_recipe(source: Path, text: str, chosen: str) -> None:
    assert same_state(saved(source, text, **RECIPES[chosen]), in_memory(source, **RECIPES[chosen]))


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3"])
def test_every_family(tmp_path: Path, text: str, family: str) -> None:
    source = write(tmp_path / "source", small(family=family, tied=True))
    assert same_state(saved(source, text), in_memory(source))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_every_precision(tmp_path: Path, text: str, stored: torch.dtype, dtype: str) -> None:
    source = write(tmp_path / "source", small().to(stored))
    assert same_state(saved(source, text, dtype=dtype), in_memory(source, dtype=dtype))


def test_shards_in_and_out(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source", small(), max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > LAYERS
    monkeypatch.setattr(model_writer, "SINGLE_FILE_BYTES", 0)
    assert same_state(saved(source, text, batch_size=2), in_memory(source, batch_size=2))
    assert len(list(source.with_name("out").glob("*.safetensors"))) == LAYERS + 2


def test_gguf(tmp_path: Path, text: str) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", small(tied=True))
    model, _, _ = open_model(str(source))
    assert not isinstance(model.source, LoadedWeights)
    assert same_state(saved(source, text), in_memory(source))


def test_hidden_states_on_disk(source: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "in_memory", lambda *_: pytest.fail("in memory"))
    got = saved(source, text, hidden_states="disk")
    monkeypatch.undo()
    assert same_state(got, in_memory(source))


def _untie(folder: Path) -> None:
    """A tied head saved besides, with values of its own: transformers does not tie it then."""
    weights = {name: SafetensorsWeights([folder / "model.safetensors"]).tensor(name).clone() for name in names(folder)}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    save(folder, weights)


def names(folder: Path) -> list[str]:
    return list(SafetensorsWeights([folder / "model.safetensors"]).shapes())


def save(folder: Path, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_copy_of_a_tied_weight_is_left_to_transformers(tmp_path: Path, text: str) -> None:
    source = write(tmp_path / "source", small(tied=True))
    _untie(source)
    assert isinstance(open_model(str(source))[0].source, LoadedWeights)
    assert same_state(saved(source, text), in_memory(source))


@pytest.mark.parametrize("chosen", ["unstructured", "neurons", "update", "head", "magnitude"])
def test_one_layer_at_a_time_is_in_memory(
    source: Path, text: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[StreamedModel] = []
    initialise = StreamedModel.__init__

    def noted(self: StreamedModel, *arguments: Any, **options: Any) -> None:
        initialise(self, *arguments, **options)
        models.append(self)

    monkeypatch.setattr(StreamedModel, "__init__", noted)
    seen: list[list[Any]] = []

    def watched(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watch(*arguments: Any, **options: Any) -> Any:
            units = [
                u
                for model in models
                for u in model.units
                if u != REST and not all(t.is_meta for t in model.tensors(u).values())
            ]
            seen.append(units)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, watch)

    watched(LayerRun, "feed")
    watched(Weights, "remove")
    watched(Neurons, "remove")
    watched(model_writer, "write_shard")
    job = Job(str(source), text, save=str(source.with_name("out")), evaluation=Evaluation(text, 32, 4))
    run_prune(job, recipe(**RECIPES[chosen]))
    assert {len(units) for units in seen} == {0, 1}  # None: when embeddings and norm are written.
    assert {unit for units in seen for unit in units} == {*range(LAYERS), "lm_head"}
    assert len(models) == 2  # The original model is there once more, to be compared with.
    for model in models:
        assert all(t.is_meta for unit in model.units if unit != REST for t in model.tensors(unit).values())
