"""Statistics of experts: collected in parts, merged, and pruned with by every method."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from experts import FAMILIES
from pruning import TEXT, random_model, recipe
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from neuronrank_core import InputError, InvalidValueError
from neuronrank_core.methods import ALL_METHODS
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.runs.collect import run_collect
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.merge import run_merge
from neuronrank_torch.runs.prune import run_prune

CHOSEN = recipe(nsamples=6, tokens_per_document=16)


def chosen(**options: Any) -> Any:
    return recipe(**{"sparsity_type": "experts", "sparsity_ratio": 0.4, "nsamples": 6, **options})


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A model with an ordinary MLP in its second layer."""
    random_model(copy.deepcopy(FAMILIES["qwen3_moe"][0])).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return Job(str(tmp_path / "model"), str(tmp_path / "text.txt"), batch_size=2)


def collected(job: Job, name: str, documents: tuple[int, int] | None = None) -> str:
    folder = str(Path(job.model).with_name(name))
    result = run_collect(Job(**{**vars(job), "save": folder}), CHOSEN, documents)
    assert result.experts
    return folder


def pruned(job: Job, stats: str | None = None, **options: Any) -> Any:
    out = str(Path(job.model).with_name("out"))
    return run_prune(Job(**{**vars(job), "save": out, "stats": stats, "force": True}), chosen(**options))


def test_parts_merge_to_the_whole(job: Job) -> None:
    parts = [collected(job, "b", (4, 6)), collected(job, "a", (0, 4))]
    run_merge(parts, str(Path(job.model).with_name("merged")))
    merged, whole = StatisticsFolder(Path(job.model).with_name("merged")), StatisticsFolder(collected(job, "whole"))
    for layer in range(3):
        one, other = merged.table(layer).columns(), whole.table(layer).columns()
        assert one.keys() == other.keys()
        assert all(one[name].tobytes() == other[name].tobytes() for name in one)
        assert ("expert_tokens" in one) == (layer != 1)
        assert ("signal_mean" in one) == (layer == 1)


def test_every_method_prunes_by_them(job: Job) -> None:
    stats = collected(job, "stats")
    for method in (name for name, method in ALL_METHODS.items() if method.ranks_experts):
        for options in ({}, {"tfidf_mode": "topic", "signal": "product", "idf_exp": 2.0}):
            by_stats, by_text = (pruned(job, given, method=method, **options) for given in (stats, None))
            # The first layer reads the same in both.
            assert by_stats.layers[0].experts_removed == by_text.layers[0].experts_removed
            assert [len(layer.experts_removed) for layer in by_stats.layers] == [2, 2]
    assert AutoConfig.from_pretrained(Path(job.model).with_name("out")).num_experts == 4
    AutoModelForCausalLM.from_pretrained(Path(job.model).with_name("out"))


def test_neither_kind_of_statistics_takes_the_place_of_the_other(job: Job) -> None:
    stats = collected(job, "stats")
    with pytest.raises(InputError, match="unstructured needs calibration text: statistics are those of experts"):
        pruned(job, stats, sparsity_type="unstructured")
    folder = StatisticsFolder(stats)
    folder.header["experts"] = False
    with pytest.raises(InputError, match="experts needs calibration text: statistics are those of neurons"):
        folder.fitted(chosen())


def test_the_sample_is_fixed_for_topics_alone(job: Job) -> None:
    stats = collected(job, "stats")
    pruned(job, stats, method="neuronrank_tfidf", tokens_per_document=4)
    with pytest.raises(InvalidValueError, match="tokens_per_document is 4, allowed: 16"):
        pruned(job, stats, method="neuronrank_tfidf", tfidf_mode="topic", tokens_per_document=4)
