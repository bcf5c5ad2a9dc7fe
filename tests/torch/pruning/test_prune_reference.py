"""The masks are those of the core alone, from plain hooks on the model and NumPy weights, near-ties apart."""

from __future__ import annotations

import copy

import pytest
import torch
from backends import MARGIN
from pruning import (
    ATTENTION,
    MLP,
    core_scores,
    core_statistics,
    disagreements,
    pruned,
    recipe,
    small,
    with_layer_of,
    zeros,
)
from tiny import Family

from neuronrank_core import METHODS
from neuronrank_core.statistics.topics import topic_margins

VARIANTS = [
    *({"method": method} for method in METHODS),
    {"method": "neuronrank_tfidf", "tfidf_mode": "token", "threshold": 0.2},
    {"method": "neuronrank_tfidf", "signal": "activated", "input_exp": 0.5, "spikiness_exp": 1.0},
    {"method": "neuronrank_wanda", "idf_exp": 2.0, "spikiness_exp": 0.5, "signal": "product", "q_active": 0.8},
    {"method": "neuronrank_wanda", "sparsity_type": "2:4"},
    {"method": "wanda", "compare": "module", "sparsity_ratio": 0.7},
    {"method": "neuronrank_wanda", "include_attention": True},
    {"method": "magnitude", "include_attention": True},
]


@pytest.mark.parametrize("chosen", VARIANTS, ids=lambda chosen: "-".join(map(str, chosen.values())))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_dense_propagation_is_the_core_on_the_dense_model(family: Family, chosen: dict) -> None:
    model, asked = small(family), recipe(**chosen, propagate="dense")
    dense = copy.deepcopy(model)
    pruned(model, asked, batch_size=1)
    modules = MLP + ATTENTION if asked.include_attention else MLP
    for layer in range(2):
        scores = core_scores(dense, layer, asked)
        for name, mask in zeros(model, layer, modules).items():
            assert disagreements(mask, scores[name], name, asked) == 0, (layer, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["magnitude", "neuronrank_wanda", "neuronrank_old"])
def test_half_precision_is_scored_in_full(method: str, dtype: torch.dtype) -> None:
    model, asked = small().to(dtype), recipe(method=method, propagate="dense")
    dense = copy.deepcopy(model)
    pruned(model, asked, batch_size=1)
    scores = core_scores(dense, 1, asked)
    for name, mask in zeros(model, 1).items():
        # No margin where rounded scores would tie and the reference's do not.
        assert disagreements(mask, scores[name], name, asked, margin=1e-5) == 0, name


@pytest.mark.parametrize("method", ["neuronrank_tfidf", "neuronrank_wanda"])
def test_topics_too_where_the_clustering_is_no_near_tie(method: str) -> None:
    compared = 0
    for seed in range(12):
        model = small(layers=1)
        asked = recipe(method=method, tfidf_mode="topic", tfidf_k=5, idf_exp=2.0, seed=seed, propagate="dense")
        table = core_statistics(model, 0, asked)
        updates, last = topic_margins(table.sample, 5, seed)
        if min(updates, last.min()) <= MARGIN:
            continue  # Runs of blanks give tokens that are equal up to rounding, and so centroids that tie.
        scores = core_scores(model, 0, asked, table)
        pruned(model, asked, batch_size=1)
        for name, mask in zeros(model, 0).items():
            assert disagreements(mask, scores[name], name, asked) == 0, (seed, name)
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("method", ["wanda", "neuronrank_wanda", "neuronrank_tfidf"])
def test_pruned_propagation_sees_the_pruned_layers_before(method: str) -> None:
    model, asked = small(layers=3), recipe(method=method)
    dense = copy.deepcopy(model)
    pruned(model, asked, batch_size=1)
    for layer in range(3):
        # What layer i saw: pruned layers before it, itself dense.
        scores = core_scores(with_layer_of(model, dense, layer), layer, asked)
        for name, mask in zeros(model, layer).items():
            assert disagreements(mask, scores[name], name, asked) == 0, (layer, name)


@pytest.mark.parametrize("method", ["wanda", "neuronrank_wanda", "neuronrank_tfidf", "magnitude"])
def test_propagation_matters_from_the_second_layer_on(method: str) -> None:
    models = [small(layers=3), small(layers=3)]
    for model, propagate in zip(models, ("pruned", "dense"), strict=True):
        pruned(model, recipe(method=method, propagate=propagate))
    for layer in range(3):
        one, other = (zeros(model, layer) for model in models)
        differ = any((one[name] != other[name]).any() for name in MLP)
        assert differ == (layer > 0 and method != "magnitude"), layer


def test_the_comparison_is_sharp() -> None:
    """A control: masks of another method would not pass for these."""
    model, dense = small(), small()
    pruned(model, recipe(method="magnitude"))
    scores = core_scores(dense, 0, recipe(method="neuronrank_old"))
    mask = zeros(model, 0)["gate_proj"]
    assert disagreements(mask, scores["gate_proj"], "gate_proj", recipe(method="neuronrank_old")) > 50
