"""Masks are equal to the bit given equal scores, however many of them tie."""

from __future__ import annotations

import numpy as np
import pytest
from backends import REFERENCE, native, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from neuronrank_core import select
from neuronrank_core.kernels import Kernels

crowded = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 1.0, 2.0])
scores = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=crowded) | arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(-2, 2, width=32)
)


def lowest(kernels: Kernels, values: np.ndarray, k: int) -> np.ndarray:
    mask = to_numpy(kernels.lowest_k(native(kernels, values), k))
    assert mask.dtype == bool
    return mask


@given(scores, st.floats(0, 1))
def test_the_lowest_of_every_row(kernels: Kernels, values: np.ndarray, ratio: float) -> None:
    k = int(ratio * values.shape[1])
    mask = lowest(kernels, values, k)
    assert (mask.sum(axis=1) == k).all()
    assert np.array_equal(mask, REFERENCE.lowest_k(values, k))


@pytest.mark.parametrize("k", [0, 5])
def test_none_and_all(kernels: Kernels, k: int) -> None:
    assert (lowest(kernels, np.zeros((3, 5), np.float32), k) == bool(k)).all()


def test_equal_scores_go_from_the_first(kernels: Kernels) -> None:
    mask = lowest(kernels, np.ones((2, 1000), np.float32), 300)
    assert (mask == (np.arange(1000) < 300)).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4)])
def test_many_small_groups(kernels: Kernels, n: int, m: int) -> None:
    rng = np.random.default_rng(m)
    values = rng.choice(np.float32([-np.inf, 0, 0.5, 1]), size=(4000, m))
    assert np.array_equal(lowest(kernels, values, n), REFERENCE.lowest_k(values, n))


def test_one_large_group(kernels: Kernels) -> None:
    values = abs(np.random.default_rng(0).normal(size=(1, 40_000)).astype(np.float16)).astype(np.float32)
    assert len(np.unique(values)) < values.size / 2
    assert np.array_equal(lowest(kernels, values, 12_345), REFERENCE.lowest_k(values, 12_345))


@given(
    arrays(np.float32, (6, 8), elements=st.sampled_from([0.5, 1.0, 1.5, 2.0])),
    arrays(np.float32, (6, 8), elements=st.sampled_from([0.0, 1.0])),
    st.sampled_from([("module", None), ("row", None), ("module", (2, 4)), ("row", (4, 8))]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_whole_selections(kernels: Kernels, score: np.ndarray, weight: np.ndarray, how: tuple, ratio: float) -> None:
    options = {"ratio": ratio, "compare": how[0], "pattern": how[1]}
    ours = select(native(kernels, score), native(kernels, weight), **options, lowest_k=kernels.lowest_k)
    assert np.array_equal(to_numpy(ours), select(score.copy(), weight, **options))


def test_a_vector_comes_in_the_kind_of_its_weight(kernels: Kernels) -> None:
    weight = native(kernels, np.ones((2, 3), np.float32))
    vector = kernels.asarray(np.arange(3.0), weight)
    assert type(vector) is type(weight)
    assert to_numpy(weight * vector).tolist() == [[0, 1, 2], [0, 1, 2]]
