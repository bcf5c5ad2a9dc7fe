"""Overlap of masks against sets of positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from neuronrank_core.overlap import Overlap, overlap

masks = (
    st.lists(st.integers(1, 4), min_size=1, max_size=4)
    .map(tuple)
    .flatmap(lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape)))
)


@given(masks)
def test_against_sets(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = ({tuple(i) for i in np.argwhere(mask)} for mask in pair)
    everything = {tuple(i) for i in np.ndindex(pair[0].shape)}
    o = overlap(*pair)
    assert (o.size, o.zeros, o.zeros_in_both) == (len(everything), (len(a), len(b)), len(a & b))
    assert o.jaccard == (len(a & b) / len(a | b) if a | b else 1.0)
    kept_a, kept_b = everything - a, everything - b
    assert o.kept_in_both == pytest.approx(len(kept_a & kept_b) / len(everything))
    assert o.kept_jaccard == pytest.approx(len(kept_a & kept_b) / len(kept_a | kept_b) if kept_a | kept_b else 1.0)


@given(masks, masks)
def test_adding_pools_the_weights(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> None:
    pooled = [np.concatenate([x.ravel(), y.ravel()])[None] for x, y in zip(first, second, strict=True)]
    assert overlap(*first) + overlap(*second) == overlap(*pooled)
    assert overlap(*first) + Overlap() == overlap(*first)


def test_chance_is_what_random_masks_come_to() -> None:
    rng = np.random.default_rng(0)
    o = overlap(rng.random((400, 400)) < 0.5, rng.random((400, 400)) < 0.3)
    assert o.kept_jaccard_by_chance == pytest.approx(o.kept_jaccard, abs=0.01)
    assert overlap(np.eye(2, dtype=bool), np.eye(2, dtype=bool)).kept_jaccard_by_chance == pytest.approx(1 / 3)
