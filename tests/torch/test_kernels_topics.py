"""Topics are the reference's wherever its choice is not a near-tie, and exact ties go to the lowest index."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from backends import MARGIN, REFERENCE, signal

from neuronrank_core import InvalidValueError
from neuronrank_core.kernels import Kernels
from neuronrank_core.statistics import topics as kmeans
from neuronrank_core.statistics.topics import topic_margins
from neuronrank_torch import kernels as torch_kernels


def clustered(seed: int, tokens: int = 120, neurons: int = 40, directions: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centre = rng.lognormal(size=(directions, neurons))
    noise = 1 + rng.random((tokens, neurons))
    return (centre[rng.integers(0, directions, tokens)] * noise * rng.uniform(0.1, 9, (tokens, 1))).astype(np.float32)


def unclustered(seed: int) -> np.ndarray:
    return signal(seed, 120, 40, whole=False)


@pytest.mark.parametrize("data", [clustered, unclustered])
def test_labels_equal_those_of_the_reference(kernels: Kernels, data: Callable[[int], np.ndarray]) -> None:
    compared = 0
    for seed in range(25):
        sample, k = data(seed), 2 + seed % 7
        updates, last = topic_margins(sample, k, seed)
        if updates <= MARGIN:
            continue
        labels = kernels.topics(sample, k, seed)
        assert labels.dtype == np.int64
        assert np.array_equal(labels[last > MARGIN], REFERENCE.topics(sample, k, seed)[last > MARGIN])
        compared += (last > MARGIN).sum()
    assert compared > 20 * 120


def test_one_topic_takes_all_and_as_many_topics_as_tokens_are_fine(kernels: Kernels) -> None:
    sample = clustered(0, tokens=12)
    assert (kernels.topics(sample, 1, 0) == 0).all()
    assert sorted(kernels.topics(sample, 12, 0)) == list(range(12))


@pytest.mark.parametrize("k", [0, 13])
def test_a_number_of_topics_out_of_range_is_refused(kernels: Kernels, k: int) -> None:
    with pytest.raises(InvalidValueError, match=r"\[1, 12\]"):
        kernels.topics(clustered(0, tokens=12), k, 0)


def test_tokens_that_never_fire_tie_and_go_to_the_first_topic(kernels: Kernels) -> None:
    sample = clustered(1)
    sample[[3, 50]] = 0
    labels = kernels.topics(sample, 4, 1)
    assert labels[3] == labels[50] == 0
    assert np.array_equal(labels, REFERENCE.topics(sample, 4, 1))


def test_the_seed_decides(kernels: Kernels) -> None:
    sample = unclustered(0)
    assert np.array_equal(kernels.topics(sample, 8, 0), kernels.topics(sample, 8, 0))
    assert not np.array_equal(kernels.topics(sample, 8, 0), kernels.topics(sample, 8, 1))


def test_an_exact_tie_goes_to_the_lowest_index() -> None:
    rng = np.random.default_rng(0)
    # Small whole numbers: products and sums are exact in any order and precision.
    rows, centroids = rng.integers(-2, 3, (300, 4)), rng.integers(-1, 2, (40, 4))
    similarity = rows @ centroids.T
    expected = similarity.argmax(axis=1)
    assert ((similarity == similarity.max(axis=1, keepdims=True)).sum(axis=1) > 1).mean() > 0.5
    assert np.array_equal(kmeans.assign(rows, centroids), expected)
    ours = torch_kernels.assign(torch.tensor(rows).float(), torch.tensor(centroids).float())
    assert np.array_equal(ours.numpy(), expected)


def test_an_empty_cluster_keeps_its_centroid() -> None:
    rows, centroids = torch.eye(3)[:2], torch.eye(3)
    labels, after = torch_kernels.spherical_kmeans(rows, centroids)
    assert labels.tolist() == [0, 1]
    assert torch.equal(after, centroids)


def test_centroids_are_those_of_the_reference() -> None:
    rng = np.random.default_rng(2)
    middles = rng.normal(size=(5, 12))
    rows = kmeans.unit_rows(middles[rng.integers(0, 5, 80)] + 0.1 * rng.normal(size=(80, 12)))
    rows[7] = 0
    labels, centroids = kmeans.spherical_kmeans(rows, rows[:5])
    ours, theirs = torch_kernels.spherical_kmeans(torch.tensor(rows).float(), torch.tensor(rows[:5]).float())
    assert np.array_equal(ours.numpy(), labels)
    np.testing.assert_allclose(theirs.numpy(), centroids, atol=1e-6)
