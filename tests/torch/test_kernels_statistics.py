"""Kernels over sampled tokens agree with the reference: order statistics and counts to the bit, means to 1e-5."""

from __future__ import annotations

import numpy as np
import pytest
from backends import REFERENCE, native, signal
from hypothesis import given
from hypothesis import strategies as st

from neuronrank_core import InvalidValueError
from neuronrank_core.kernels import Kernels

samples = st.builds(signal, st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(1, 6), whole=st.booleans())
#: Round values are where a rank computed in another precision would slip.
quantiles = st.sampled_from([0.05, 0.1, 0.3, 0.35, 0.55, 0.6, 0.7, 0.9, 0.95, 1 / 3]) | st.floats(0.01, 0.99)


def labels_of(sample: np.ndarray, groups: int) -> np.ndarray:
    return np.random.default_rng(len(sample)).integers(0, groups, size=len(sample))


@given(samples, quantiles)
def test_the_threshold_is_the_same_to_the_bit(kernels: Kernels, sample: np.ndarray, q: float) -> None:
    tau = kernels.quantile_threshold(sample, q)
    assert tau.dtype == np.float32
    assert np.array_equal(tau, REFERENCE.quantile_threshold(sample, q))


def test_the_threshold_has_its_rank_at_every_length(kernels: Kernels) -> None:
    for tokens in range(1, 130):
        ranks = np.random.default_rng(tokens).permutation(tokens).astype(np.float32)[:, None]
        for q in (0.1, 0.35, 0.55, 0.6, 0.7):
            assert np.array_equal(kernels.quantile_threshold(ranks, q), REFERENCE.quantile_threshold(ranks, q))


@pytest.mark.parametrize("q", [0.0, 1.0, -0.1])
def test_a_quantile_out_of_range_is_refused(kernels: Kernels, q: float) -> None:
    with pytest.raises(InvalidValueError, match="q_active"):
        kernels.quantile_threshold(signal(0, 5, 2, whole=False), q)


@given(samples, quantiles, st.integers(1, 5))
def test_active_tokens_are_counted_alike(kernels: Kernels, sample: np.ndarray, q: float, groups: int) -> None:
    tau, labels = REFERENCE.quantile_threshold(sample, q), labels_of(sample, groups)
    active = kernels.active_tokens(sample, tau, labels, groups)
    assert active.dtype == np.int64
    assert np.array_equal(active, REFERENCE.active_tokens(sample, tau, labels, groups))
    # A token exactly at the threshold fires: it is one of the sample, so somebody always does.
    assert (active.sum(axis=0) >= 1).all()


@given(samples, st.integers(1, 5))
def test_means_of_groups(kernels: Kernels, sample: np.ndarray, groups: int) -> None:
    labels = labels_of(sample, groups)
    means = kernels.group_means(sample, labels, groups)
    assert means.dtype == np.float64
    np.testing.assert_allclose(means, REFERENCE.group_means(sample, labels, groups), rtol=1e-5)
    empty = np.bincount(labels, minlength=groups) == 0
    assert (means[empty] == 0).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 9))
def test_norms_of_columns(kernels: Kernels, seed: int, rows: int, columns: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    norm = kernels.column_norm(native(kernels, weight))
    assert norm.dtype == np.float64
    np.testing.assert_allclose(norm, np.sqrt((weight.astype(np.float64) ** 2).sum(axis=0)), rtol=1e-5)


def test_what_is_handed_in_stays_as_it_was(kernels: Kernels) -> None:
    sample, labels = signal(3, 30, 4, whole=False), np.arange(30) % 3
    before, tau = sample.copy(), kernels.quantile_threshold(sample, 0.6)
    kernels.active_tokens(sample, tau, labels, 3)
    kernels.group_means(sample, labels, 3)
    kernels.topics(sample, 3, 0)
    assert np.array_equal(sample, before)
    assert np.array_equal(labels, np.arange(30) % 3)
