"""Statistics collected once: what they say, and that pruning by them is pruning by the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import plain
from pruning import SMALL, TEXT, core_statistics, recipe, same_state
from safetensors.numpy import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from tiny_files import write_model
from torch import Tensor, nn

from neuronrank_core import METHODS, InputError, InvalidValueError, MissingStatisticsError, Recipe
from neuronrank_core.statistics.table import INPUTS, SIGNAL
from neuronrank_torch import prune
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.files.json import read_sealed, seal
from neuronrank_torch.model.open import load_model
from neuronrank_torch.runs.collect import run_collect
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.prune import run_prune
from neuronrank_torch.text.sequences import calibration_sequences
from neuronrank_torch.text.sources import text_fingerprint

LAYERS = 3
SAMPLING = {name: SMALL[name] for name in ("nsamples", "seqlen", "tokens_per_document")}
#: What is asked of the statistics besides every method as it is.
RECIPES: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    "topics": {"method": "neuronrank_tfidf", "tfidf_mode": "topic", "spikiness_exp": 0.5},
    "tokens": {"method": "neuronrank_tfidf", "tfidf_mode": "token", "input_exp": 0.5},
    "attention": {"include_attention": True},
    "attention by magnitude": {"include_attention": True, "method": "magnitude"},
    "2:4": {"sparsity_type": "2:4"},
    "last": {"pruning_last": 2},
    "head": {"prune_lm_head": True},
    "neurons": {"sparsity_type": "neurons", "sparsity_ratio": 0.25},
    "neurons by nothing": {"sparsity_type": "neurons", "method": "neuronrank_tfidf", "tf_exp": 0.0, "idf_exp": 0.0},
    "allocated": {"allocate": "neuronrank", "pruning_last": 2},
    "allocated to both": {"allocate": "both"},
    "allocated magnitude": {"allocate": "neuronrank", "method": "magnitude"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    write_model(folder, tiny_model(layers=LAYERS, hidden=32, intermediate=64, tied=False))
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def collected(source: Path, name: str, documents: Any = None, batch_size: Any = None, **chosen: Any) -> Path:
    target = source.with_name(name)
    job = Job(str(source), str(source.with_name("text.txt")), save=str(target), batch_size=batch_size)
    run_collect(job, Recipe(**{**SAMPLING, **chosen}), documents)
    return target


@pytest.fixture(scope="module")
def stats(source: Path) -> Path:
    return collected(source, "stats")


def by_text(source: Path, **chosen: Any) -> dict[str, Tensor]:
    model, tokenizer, _ = load_model(str(source))
    prune(model, tokenizer, recipe(**chosen, propagate="dense"), TEXT)
    return model.state_dict()


@pytest.mark.parametrize("chosen", RECIPES)
def test_pruned_by_statistics_is_pruned_by_the_text(source: Path, stats: Path, chosen: str, tmp_path: Path) -> None:
    expected = by_text(source, **RECIPES[chosen])
    model, tokenizer, _ = load_model(str(source))
    prune(model, tokenizer, recipe(**RECIPES[chosen]), statistics=StatisticsFolder(stats))
    assert same_state(model.state_dict(), expected)
    out = tmp_path / "out"
    job = Job(str(source), "gone.txt", save=str(out), stats=str(stats))
    run_prune(job, recipe(**{**RECIPES[chosen], "nsamples": 9, "seqlen": 500}))  # The statistics say how many.
    assert same_state(load_model(str(out))[0].state_dict(), expected)


def test_statistics_are_those_of_a_plain_run(source: Path, stats: Path) -> None:
    """Against hooks on the whole model, one sequence at a time, reduced by the core in float64."""
    model = load_model(str(source))[0]
    chosen = Recipe(**SAMPLING)
    hidden = [
        model(sequence[None], output_hidden_states=True, use_cache=False).hidden_states
        for sequence in calibration_sequences(tiny_tokenizer(True), chosen, TEXT)
    ]
    folder = StatisticsFolder(stats)
    assert folder.units == [0, 1, 2, "lm_head"]
    for layer in range(LAYERS):
        table = folder.table(layer).columns()
        norms = table.pop("residual_norm")
        assert table.pop("error_gain").tolist()[:1] == [1]
        reference = core_statistics(model, layer, chosen, tiny_tokenizer(True)).columns()
        assert table.keys() == reference.keys()
        for name, column in reference.items():
            np.testing.assert_allclose(table[name], column, rtol=2e-5, atol=1e-7, err_msg=name)
        if layer < LAYERS - 1:  # What transformers returns last has gone through the final norm.
            after = torch.cat([states[layer + 1] for states in hidden]).norm(dim=-1)
            np.testing.assert_allclose(norms, after.detach(), rtol=1e-5)
    squares = torch.cat([states[-1] for states in hidden]).square().mean(1)
    head = folder.table("lm_head").input_mean_square["lm_head"]
    np.testing.assert_allclose(head, squares.detach(), rtol=1e-5)


def test_the_header_says_what_the_tables_are_of(source: Path, stats: Path) -> None:
    header = StatisticsFolder(stats).header
    assert header["model_type"] == "llama"
    assert header["layers"] == LAYERS
    assert header["text_sha256"] == text_fingerprint(TEXT)
    assert header["documents"] == list(range(6))
    assert header["dtype"] == "float32"
    assert header["fingerprint"].keys() == {file.name for file in source.iterdir()}
    assert header.items() >= {**SAMPLING, "seed": 0, "bos": "window", "signal": "gate", "threshold": 0.0}.items()
    assert not list(stats.parent.glob(".*"))


def test_other_settings_are_collected(source: Path) -> None:
    settings = {"signal": "product", "threshold": 0.2, "tokens_per_document": 5, "seed": 3}
    folder = StatisticsFolder(collected(source, "other", batch_size=4, **settings))
    chosen = Recipe(**{**SAMPLING, **settings})
    table = folder.table(1)
    reference = core_statistics(load_model(str(source))[0], 1, chosen, tiny_tokenizer(True))
    assert np.array_equal(table.open_gate, reference.open_gate)
    np.testing.assert_allclose(table.sample, reference.sample, rtol=2e-5, atol=1e-7)


def copied(stats: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any] = lambda header: None) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in stats.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    header = read_sealed(folder / "statistics.json", "")
    change(header)
    (folder / "statistics.json").write_text(json.dumps(seal(header)))
    return folder


@pytest.mark.parametrize(
    ("chosen", "kind"), [({"method": "wanda"}, INPUTS), ({"method": "neuronrank_old"}, SIGNAL), ({}, INPUTS)]
)
def test_only_what_a_method_needs_is_read(
    source: Path, stats: Path, tmp_path: Path, chosen: dict[str, Any], kind: str
) -> None:
    folder = copied(stats, tmp_path)
    beginnings = {INPUTS: ("input_",), SIGNAL: ("signal_", "open_gate")}
    for file in folder.glob("layer-*"):
        kept = {n: c for n, c in load_file(file).items() if n.startswith((*beginnings[kind], "document", "tokens"))}
        save_file(kept, file, metadata={"format": "1", "header": "{}"})
    model, tokenizer, _ = load_model(str(source))
    prune(model, tokenizer, recipe(**chosen), statistics=StatisticsFolder(folder))
    assert same_state(model.state_dict(), by_text(source, **chosen))
    assert StatisticsFolder(stats).table(0, {kind}).columns().keys() == kept.keys()
    with pytest.raises(MissingStatisticsError, match="no column"):
        prune(model, tokenizer, recipe(method="neuronrank_tfidf"), statistics=StatisticsFolder(folder))


@pytest.mark.parametrize(
    ("chosen", "refused"),
    [
        ({"signal": "product"}, False),
        ({"signal": "product", "method": "neuronrank_old"}, True),
        ({"threshold": 0.5, "method": "neuronrank_tfidf"}, False),
        ({"threshold": 0.5, "method": "neuronrank_tfidf", "tfidf_mode": "token"}, True),
        ({"tokens_per_document": 8, "method": "neuronrank_old"}, False),
        ({"tokens_per_document": 8, "method": "neuronrank_tfidf"}, True),
    ],
)
def test_settings_of_the_collection_cannot_be_changed(stats: Path, chosen: dict[str, Any], refused: bool) -> None:
    folder, asked = StatisticsFolder(stats), recipe(**chosen)
    if not refused:
        assert folder.fitted(asked).propagate == "dense"
        return
    with pytest.raises(InvalidValueError, match="was collected with") as error:
        folder.fitted(asked)
    assert error.value.field in chosen
    assert "collect again" in error.value.hint


def test_the_update_needs_text(stats: Path) -> None:
    with pytest.raises(InputError, match="needs calibration text") as error:
        StatisticsFolder(stats).fitted(recipe(update="least-squares"))
    assert "--stats" in error.value.hint


def test_topics_are_held_against_what_was_collected(stats: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"tfidf_k is 97, allowed: \[1, 96\]"):
        StatisticsFolder(stats).fitted(recipe(method="neuronrank_tfidf", tfidf_mode="topic", tfidf_k=97, nsamples=50))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format=2), "newer than 1"),
        (lambda h: h.update(documents=[0, 1, 2, 3, 4, 7]), "does not match the documents"),
    ],
)
def test_a_folder_that_cannot_be_trusted(stats: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = copied(stats, tmp_path, change)
    with pytest.raises(InputError, match=message) as error:
        StatisticsFolder(folder).table(0)
    assert error.value.hint


@pytest.mark.parametrize("name", ["gone", "model"])
def test_no_folder_of_statistics(source: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is not a statistics folder"):
        StatisticsFolder(source.with_name(name))


@pytest.mark.parametrize("change", ["weights", "layers"])
def test_another_model_is_refused(stats: Path, tmp_path: Path, change: str) -> None:
    other = tmp_path / "other"
    write_model(other, tiny_model(layers=LAYERS + (change == "layers"), hidden=32, intermediate=64, tied=False, seed=1))
    with pytest.raises(InputError, match="statistics of another model"):
        run_prune(Job(str(other), save=str(tmp_path / "out"), stats=str(stats)), recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    if change == "layers":
        model, tokenizer, _ = load_model(str(other))
        with pytest.raises(InputError, match="of 3 layers, but the model has 4"):
            prune(model, tokenizer, recipe(), statistics=StatisticsFolder(stats))


@pytest.mark.parametrize("family", ["gpt_neox", "phi"])
@pytest.mark.parametrize("hidden_states", ["memory", "disk"])
def test_the_head_is_there_whatever_comes_before_it(tmp_path: Path, family: str, hidden_states: Any) -> None:
    """A last norm of another name; as a hook on the head of the whole model sees it."""
    source, text = tmp_path / "model", tmp_path / "text.txt"
    model = plain(family)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(5)))
    model.config.tie_word_embeddings = False
    write_model(source, model)
    text.write_text(TEXT)
    job = Job(str(source), str(text), save=str(tmp_path / "stats"), hidden_states=hidden_states, batch_size=2)
    run_collect(job, Recipe(**SAMPLING))
    whole, squares = load_model(str(source))[0], []
    whole.get_output_embeddings().register_forward_pre_hook(lambda _, args: squares.append(args[0].square().mean(1)))
    with torch.no_grad():
        whole(calibration_sequences(tiny_tokenizer(True), Recipe(**SAMPLING), TEXT), use_cache=False)
    found = StatisticsFolder(tmp_path / "stats").table("lm_head").input_mean_square["lm_head"]
    np.testing.assert_allclose(found, squares[0], rtol=1e-4)
    assert len({*squares[0].mean(0).tolist()}) > 10
