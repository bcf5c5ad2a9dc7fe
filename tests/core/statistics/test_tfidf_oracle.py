"""The kernels over sampled tokens against plain loops, and the threshold against the interpolated quantile."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from layers import seeds
from numpy.typing import NDArray

from neuronrank_core.statistics import tfidf

GROUPS = 4
qs = st.integers(1, 99).map(lambda percent: percent / 100)
#: Whole numbers, so that ties and silent neurons are common.
samples = st.integers(1, 20).flatmap(
    lambda tokens: arrays(np.float32, (tokens, 3), elements=st.integers(0, 6).map(float))
)


def labels_for(sample: NDArray[np.float32], seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, GROUPS, size=len(sample))


@given(samples, qs)
def test_threshold_is_an_order_statistic(sample: NDArray[np.float32], q: float) -> None:
    tau = tfidf.quantile_threshold(sample, q)
    assert tau.dtype == np.float32
    for j in range(3):
        ordered = sorted(float(v) for v in sample[:, j])
        assert tau[j] == ordered[math.ceil(q * (len(ordered) - 1))]


@given(samples, qs)
def test_activity_is_that_of_the_interpolated_quantile(sample: NDArray[np.float32], q: float) -> None:
    interpolated = np.quantile(sample.astype(np.float64), q, axis=0)
    assert np.array_equal(sample >= tfidf.quantile_threshold(sample, q), sample >= interpolated)


@given(samples, seeds, qs)
def test_active_tokens(sample: NDArray[np.float32], seed: int, q: float) -> None:
    labels, tau = labels_for(sample, seed), tfidf.quantile_threshold(sample, q)
    counts = [[0] * 3 for _ in range(GROUPS)]
    for t, group in enumerate(labels):
        for j in range(3):
            counts[group][j] += bool(sample[t, j] >= tau[j])
    active = tfidf.active_tokens(sample, tau, labels, GROUPS)
    assert active.tolist() == counts
    assert active.dtype == np.int64


@given(samples, seeds, st.integers(1, 99))
def test_document_frequency(sample: NDArray[np.float32], seed: int, percent: int) -> None:
    labels, tau = labels_for(sample, seed), tfidf.quantile_threshold(sample, percent / 100)
    sizes = [int((labels == group).sum()) for group in range(GROUPS)]
    df = [0] * 3
    for group, size in enumerate(sizes):
        for j in range(3):
            active = sum(bool(sample[t, j] >= tau[j]) for t in range(len(sample)) if labels[t] == group)
            # active / size >= 1 - q, in whole numbers.
            df[j] += size > 0 and 100 * active >= (100 - percent) * size
    active_tokens = tfidf.active_tokens(sample, tau, labels, GROUPS)
    assert tfidf.document_frequency(active_tokens, sizes, percent / 100).tolist() == df


@given(samples, seeds)
def test_group_means(sample: NDArray[np.float32], seed: int) -> None:
    labels = labels_for(sample, seed)
    means = tfidf.group_means(sample, labels, GROUPS)
    for group in range(GROUPS):
        of = [t for t in range(len(sample)) if labels[t] == group]
        for j in range(3):
            expected = sum(float(sample[t, j]) for t in of) / len(of) if of else 0.0
            assert means[group, j] == pytest.approx(expected, rel=1e-12)


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_over_documents(seed: int, tokens: list[int]) -> None:
    column = np.random.default_rng(seed).normal(size=(len(tokens), 3)).astype(np.float32)
    means = tfidf.over_documents(column, tokens)
    assert means.dtype == np.float64
    for j in range(3):
        total = sum(float(column[d, j]) * n for d, n in enumerate(tokens))
        assert means[j] == pytest.approx(total / sum(tokens), rel=1e-12, abs=1e-15)
