"""What single neurons and groups stand out by: hand-worked cases and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronrank_core import LayerStatistics
from neuronrank_core.statistics.selectivity import by_selectivity, lift, strongest_tokens, typical_terms
from neuronrank_core.statistics.table import sample_positions


def test_lift_by_hand() -> None:
    means = [[1.0, 0.0, 4.0], [3.0, 0.0, 0.0]]
    assert lift(means).tolist() == [[0.5, 1.0, 2.0], [1.5, 1.0, 0.0]]


def test_typical_terms_by_hand() -> None:
    # "the" stands twice in both groups, so its IDF is 1; "cat" and "dog" stand in one, with an IDF of log(3 / 2) + 1.
    terms = ["the", "cat", "the", "the", "dog", "dog", "the"]
    groups = [0, 0, 0, 1, 1, 1, 1]
    assert typical_terms(terms, groups, 2, 5) == [["the", "cat"], ["dog", "the"]]
    assert typical_terms(terms, groups, 2, 1) == [["the"], ["dog"]]
    assert typical_terms(["b", "a"], [0, 0], 1, 5) == [["a", "b"]]


def test_a_common_word_yields_to_one_of_its_own() -> None:
    terms = ["the", "cat", "the", "dog", "the", "cow"]
    assert [typical[0] for typical in typical_terms(terms, [0, 0, 1, 1, 2, 2], 3, 2)] == ["cat", "dog", "cow"]


scores = st.lists(st.tuples(st.sampled_from([1.0, 1.5, 2.0]), st.sampled_from([1.0, 3.0])), min_size=1, max_size=8)


@given(scores)
def test_selectivity_is_idf_then_spikiness_then_place(pairs: list[tuple[float, float]]) -> None:
    expected = sorted(range(len(pairs)), key=lambda i: (-pairs[i][0], -pairs[i][1], i))
    assert by_selectivity(*np.array(pairs).T).tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=9), st.integers(1, 4))
def test_strongest_tokens_by_brute_force(tokens: list[tuple[int, int]], most: int) -> None:
    best = {}
    for i, (signal, document) in enumerate(tokens):
        if signal and signal > tokens[best[document]][0] if document in best else signal:
            best[document] = i
    expected = sorted(best.values(), key=lambda i: (-tokens[i][0], i))[:most]
    signal, document = np.array(tokens, dtype=int).reshape(-1, 2).T
    assert strongest_tokens(signal, document, most).tolist() == expected


def test_positions_of_sampled_tokens() -> None:
    table = LayerStatistics(
        document=np.array([3, 5]),
        tokens=np.array([10, 2]),
        sample=np.zeros((6, 1), np.float32),
        sample_tokens=np.array([4, 2]),
    )
    assert table.sampled_positions().tolist() == [*sample_positions(10, 4), 0, 1] == [0, 2, 5, 7, 0, 1]


@pytest.mark.parametrize("tokens", [1, 7, 64, 65])
def test_sampled_positions_are_those_of_the_collection(tokens: int) -> None:
    kept = sample_positions(tokens)
    sample = np.zeros((len(kept), 1), np.float32)
    table = LayerStatistics(np.array([0]), np.array([tokens]), sample=sample, sample_tokens=np.array([len(kept)]))
    assert table.sampled_positions().tolist() == kept.tolist()
