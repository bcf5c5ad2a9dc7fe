"""Topics: random numbers from the seed, ties, empty clusters, zero rows, and an objective that never gets worse."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import seeds

from neuronrank_core import InvalidValueError
from neuronrank_core.statistics.topics import (
    ITERATIONS,
    PROJECTION_DIM,
    assign,
    spherical_kmeans,
    topic_draws,
    topics,
    unit_rows,
    update,
)


def objective(rows: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> float:
    return float(sum(rows[t] @ centroids[label] for t, label in enumerate(labels)))


@given(seeds, st.integers(1, 30), st.integers(1, 8))
def test_the_objective_never_gets_worse(seed: int, tokens: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    rows = unit_rows(rng.normal(size=(tokens, 3)))
    initial = unit_rows(rng.normal(size=(k, 3)))
    reached = [objective(rows, *spherical_kmeans(rows, initial, iterations=i)) for i in range(6)]
    assert np.all(np.diff(reached) >= -1e-12)


@given(seeds, st.integers(1, 30), st.integers(1, 8))
def test_labels_belong_to_the_centroids(seed: int, tokens: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    rows = unit_rows(rng.normal(size=(tokens, 3)))
    labels, centroids = spherical_kmeans(rows, unit_rows(rng.normal(size=(k, 3))))
    assert np.array_equal(labels, assign(rows, centroids))
    assert np.linalg.norm(centroids, axis=1) == pytest.approx(np.ones(k))


def test_the_number_of_iterations_is_that_of_the_specification() -> None:
    rng = np.random.default_rng(2)
    rows, initial = unit_rows(rng.normal(size=(60, 4))), unit_rows(rng.normal(size=(6, 4)))
    centroids = initial
    for _ in range(4):
        centroids = update(rows, assign(rows, centroids), centroids)
    assert ITERATIONS == 4
    assert np.array_equal(spherical_kmeans(rows, initial)[1], centroids)


def test_one_update_is_the_normalised_mean_and_an_empty_cluster_keeps_its_centroid() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    centroids = np.array([[0.6, 0.8], [0.0, -1.0], [-0.6, 0.8]])
    moved = update(rows, np.array([0, 0, 2]), centroids)
    assert moved == pytest.approx(np.array([[0.5**0.5, 0.5**0.5], [0.0, -1.0], [-1.0, 0.0]]))
    assert moved[1].tolist() == [0.0, -1.0]


def test_rows_that_cancel_leave_their_centroid_where_it_is() -> None:
    assert update(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([0, 0]), np.array([[0.0, 1.0]])).tolist() == [[0, 1]]


def test_ties_go_to_the_lowest_index() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert assign(rows, [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]).tolist() == [1, 0, 1]
    assert assign(rows[:1], [[0.0, 1.0], [0.0, -1.0]]).tolist() == [0]


def test_zero_rows_stay_zero_and_fall_to_the_first_topic() -> None:
    rows = unit_rows([[0.0, 0.0], [3.0, 4.0]])
    assert rows == pytest.approx(np.array([[0.0, 0.0], [0.6, 0.8]]))
    assert assign(rows, [[0.0, -1.0], [0.0, 1.0]]).tolist() == [0, 1]
    assert topics(np.zeros((5, 3)), 4, 0).tolist() == [0] * 5


@given(seeds, st.integers(0, 99))
def test_the_same_seed_gives_the_same_topics(seed: int, other: int) -> None:
    sample = np.random.default_rng(other).exponential(size=(20, 6)).astype(np.float32)
    labels = topics(sample, 4, seed)
    assert labels.dtype == np.int64
    assert set(labels.tolist()) <= set(range(4))
    np.random.default_rng(0).random(10)  # other generators do not matter
    assert np.array_equal(labels, topics(sample, 4, seed))
    assert np.array_equal(labels, topics(8 * sample, 4, seed))  # nor does the length of a row


def test_different_seeds_draw_differently() -> None:
    draws = [topic_draws(50, 6, 5, seed) for seed in range(4)]
    for one, other in pairwise(draws):
        assert not np.array_equal(one[0], other[0])
        assert not np.array_equal(one[1], other[1])


@given(seeds, st.integers(1, 40), st.data())
def test_initial_centroids_are_distinct_tokens(seed: int, tokens: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, tokens))
    initial = topic_draws(tokens, 3, k, seed)[1]
    assert len(set(initial.tolist())) == k
    assert 0 <= initial.min() <= initial.max() < tokens


def test_the_projection_is_gaussian_and_keeps_lengths_on_average() -> None:
    projection, _ = topic_draws(10, 500, 2, seed=1)
    assert projection.shape == (500, PROJECTION_DIM) == (500, 128)
    assert projection.dtype == np.float32
    assert projection.mean() == pytest.approx(0, abs=1e-3)
    assert projection.std() == pytest.approx(128**-0.5, rel=0.01)


@pytest.mark.parametrize("k", [0, -1, 11])
def test_more_topics_than_tokens_or_none_is_an_error(k: int) -> None:
    with pytest.raises(InvalidValueError, match=r"tfidf_k is .*\[1, 10\]"):
        topics(np.ones((10, 3)), k, 0)
