"""Topics against scikit-learn: one assignment step, and whole clusterings from the same start."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from layers import seeds
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, pairwise_distances_argmin

from neuronrank_core.statistics.topics import assign, spherical_kmeans, topic_draws, topics, unit_rows

#: Relative margin below which two centroids are as near as each other.
MARGIN = 1e-5


@given(seeds, st.integers(1, 40), st.integers(1, 12), st.integers(2, 20))
def test_one_assignment_step(seed: int, tokens: int, k: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    rows, centroids = unit_rows(rng.normal(size=(tokens, dim))), unit_rows(rng.normal(size=(k, dim)))
    ours, theirs = assign(rows, centroids), pairwise_distances_argmin(rows, centroids)
    dots = np.sort(rows @ centroids.T, axis=1)
    clear = np.full(tokens, True) if k == 1 else dots[:, -1] - dots[:, -2] > MARGIN
    assert np.array_equal(ours[clear], theirs[clear])
    assert clear.mean() > 0.9 or tokens < 10


def test_a_near_tie_is_told_apart_by_its_margin() -> None:
    # Two centroids one part in a million apart: each row belongs to its own, and both libraries see that.
    def at(*angles: float) -> np.ndarray:
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    centroids, rows = at(0.0, 1e-6), at(-0.5, 0.5 + 1e-6)
    dots = rows @ centroids.T
    assert 0 < abs(dots[:, 0] - dots[:, 1]).max() < MARGIN
    assert assign(rows, centroids).tolist() == pairwise_distances_argmin(rows, centroids).tolist() == [0, 1]


def test_an_exact_tie_goes_to_the_lowest_index_in_both() -> None:
    rows, centroids = np.eye(3)[:2], np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert assign(rows, centroids).tolist() == pairwise_distances_argmin(rows, centroids).tolist() == [1, 0]


def separated(seed: int, k: int, dim: int = 12, tokens: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative rows around k directions that share little, and the direction of each."""
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(k), rng.integers(0, k, size=tokens - k)])
    length = rng.uniform(0.5, 20, size=(tokens, 1))
    return length * (np.eye(k, dim)[truth] + 0.05 * rng.random((tokens, dim))), truth


@given(seeds, st.integers(2, 6))
def test_whole_clusterings_agree_on_separated_clusters(seed: int, k: int) -> None:
    sample, truth = separated(seed, k)
    rows = unit_rows(sample)
    initial = rows[:k]
    ours = spherical_kmeans(rows, initial)[0]
    theirs = KMeans(n_clusters=k, n_init=1, init=initial, max_iter=4).fit(rows).labels_
    assert adjusted_rand_score(ours, theirs) == 1.0
    assert np.array_equal(ours, theirs)
    assert np.array_equal(ours, truth)


def test_topics_are_that_clustering_of_the_projected_rows() -> None:
    k, compared = 3, 0
    for seed in range(20):
        sample, truth = separated(seed, k)
        projection, initial = topic_draws(len(sample), sample.shape[1], k, seed)
        if len(set(truth[initial])) < k:
            continue  # two centroids start in one cluster: nothing that four iterations settle
        rows = unit_rows(sample @ projection)
        theirs = KMeans(n_clusters=k, n_init=1, init=rows[initial], max_iter=4).fit(rows).labels_
        assert adjusted_rand_score(topics(sample, k, seed), theirs) == 1.0
        assert np.array_equal(truth[initial][theirs], truth)
        compared += 1
    assert compared >= 3
