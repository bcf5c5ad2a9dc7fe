"""The traps of the specification, one test each: what an earlier implementation got wrong.

Flags that were parsed and never used have a file of their own, ``test_flags_are_read.py``.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from layers import random_layer

from neuronrank_core import (
    InputError,
    LayerStatistics,
    NeuronStatistics,
    Recipe,
    ScoringContext,
    document_statistics,
    merge,
    prune_mask,
)
from neuronrank_core.statistics import tfidf


def table(*documents: object, **options: int) -> LayerStatistics:
    return merge(document_statistics(i, signal=a, **options) for i, a in enumerate(documents))


def test_the_threshold_comes_from_the_whole_corpus_so_idf_tells_neurons_apart() -> None:
    # Neuron 0 fires alike in all five documents, neuron 1 mostly in the last.
    usual = np.stack([np.arange(10.0), np.arange(10.0) / 10], axis=1)
    last = usual + np.array([0, 10])
    neurons = NeuronStatistics(table(usual, usual, usual, usual, last), Recipe())
    assert neurons.df.tolist() == [5, 1]
    assert neurons.idf == pytest.approx([1.0, np.log(3) + 1])
    # The trap: with a threshold of its own, every document finds both neurons active.
    own = [tfidf.active_tokens(a, tfidf.quantile_threshold(a, 0.6), np.zeros(10), 1)[0] for a in (usual, last)]
    assert np.all(np.array(own) >= 4)


def test_on_a_random_corpus_idf_is_no_constant() -> None:
    layer = random_layer(0, neurons=32, lengths=[20] * 12)
    for mode in ("doc", "topic", "token"):
        recipe = Recipe(tfidf_mode=mode, tfidf_k=8)
        assert len(set(NeuronStatistics(layer.collect(recipe), recipe).df.tolist())) >= 3


def test_a_document_counts_once_however_it_arrives() -> None:
    rows = [document_statistics(i, signal=np.full((n, 1), 1.0 + n)) for i, n in enumerate([3, 4, 5])]
    for a, b, c in permutations(rows):
        for whole in (merge([a, b, c]), merge([merge([a, b]), c]), merge([a, merge([b, c])])):
            neurons = NeuronStatistics(whole, Recipe(q_active=0.5))
            assert neurons.groups == 3
            assert neurons.df.tolist() == [2]  # tau is 5, the level of the second document
            assert neurons.tf == pytest.approx([(3 * 4 + 4 * 5 + 5 * 6) / 12])
    # The trap: the same document again, from another hook call.
    with pytest.raises(InputError, match="share documents"):
        merge([merge(rows), rows[0]])


def test_no_sequence_length_is_assumed() -> None:
    documents = [np.full((1, 2), 8.0), np.full((7, 2), 1.0), np.full((3, 2), 2.0)]
    neurons = NeuronStatistics(table(*documents), Recipe())
    assert neurons.tf == pytest.approx(np.full(2, (8 + 7 + 6) / 11))
    assert NeuronStatistics(table(*documents), Recipe(tfidf_mode="token")).groups == 11
    padded = merge(
        document_statistics(i, signal=np.pad(a, ((0, 7 - len(a)), (0, 0))), padding=np.arange(7) >= len(a))
        for i, a in enumerate(documents)
    )
    assert NeuronStatistics(padded, Recipe()).tf.tolist() == neurons.tf.tolist()


@pytest.mark.parametrize("mode", ["doc", "topic", "token"])
def test_df_never_exceeds_the_groups_so_the_metric_is_not_clamped_to_zero(mode: str) -> None:
    # Many tokens in few groups, every gate open and every signal at its threshold: the most that can be counted.
    always_on = table(*[np.ones((50, 3))] * 2)
    recipe = Recipe(method="neuronrank_tfidf", tfidf_mode=mode, tfidf_k=2, idf_exp=2.0)
    neurons = NeuronStatistics(always_on, recipe)
    assert neurons.df.tolist() == [neurons.groups] * 3
    assert neurons.idf.tolist() == [1.0] * 3
    weights = {"gate_proj": np.arange(1.0, 13).reshape(3, 4)}
    mask = prune_mask("gate_proj", ScoringContext(0, recipe, weights, always_on))
    assert mask.ravel().tolist() == [True] * 6 + [False] * 6


def test_topics_are_clustered_over_all_documents_together() -> None:
    # Two kinds of tokens, each in a document of its own, and a third document that mixes them.
    one, other = np.array([1.0, 0.0, 0.2]), np.array([0.0, 1.0, 0.2])
    documents = np.stack([one] * 4), np.stack([other] * 4), np.stack([one, other, one, other])
    # A seed whose initial centroids are of different kinds.
    corpora = (NeuronStatistics(table(*documents), Recipe(tfidf_mode="topic", tfidf_k=2, seed=s)) for s in range(20))
    neurons = next(corpus for corpus in corpora if corpus.groups == 2)
    labels = neurons.labels.tolist()
    assert labels == [labels[0]] * 4 + [labels[4]] * 4 + [labels[0], labels[4]] * 2
    assert labels[0] != labels[4]
    # Clustered document by document there would be up to two topics each: six groups in all.
    assert neurons.df.tolist() == [1, 1, 2]


@pytest.mark.parametrize("fields", [{}, {"sparsity_ratio": 0.3}, {"compare": "row"}, {"sparsity_type": "2:4"}])
def test_ties_prune_exactly_what_was_asked(fields: dict) -> None:
    # The trap, `metric <= threshold`, prunes everything here.
    weight = np.where(np.arange(80).reshape(8, 10) % 3, 1.0, -1.0)[:, : 8 if "sparsity_type" in fields else 10]
    recipe = Recipe(method="magnitude", **fields)
    mask = prune_mask("up_proj", ScoringContext(0, recipe, {"up_proj": weight}))
    assert mask.sum() == int(recipe.ratio * weight.size)
    if not fields:
        assert mask.ravel().tolist() == [True] * 40 + [False] * 40
