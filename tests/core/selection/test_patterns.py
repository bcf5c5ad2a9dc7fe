"""N:M sparsity: the N lowest of each run of M consecutive inputs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from neuronrank_core import AllZeroMetricError, InvalidValueError, select
from neuronrank_core.recipe import parse_pattern

patterns = st.integers(2, 8).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@given(patterns, st.integers(1, 4), st.integers(1, 3), st.data())
def test_any_pattern_against_every_choice(pattern: tuple[int, int], rows: int, runs: int, data: st.DataObject) -> None:
    n, m = pattern
    score = data.draw(arrays(np.float64, (rows, runs * m), elements=st.integers(1, 4).map(float)))
    mask = select(score.copy(), np.ones_like(score), ratio=0.9, compare="row", pattern=pattern)
    for row, marked in zip(score, mask, strict=True):
        for start in range(0, runs * m, m):
            run = row[start : start + m].tolist()
            # Combinations come in ascending order of their indices, so the first of the cheapest is the one.
            cheapest = min(combinations(range(m), n), key=lambda c: sum(run[i] for i in c))
            assert tuple(np.flatnonzero(marked[start : start + m])) == cheapest


@pytest.mark.parametrize(("pattern", "kept"), [((2, 4), 0.5), ((4, 8), 0.5), ((1, 4), 0.75)])
@pytest.mark.parametrize("compare", ["module", "row"])
def test_a_pattern_sets_the_share_itself(pattern: tuple[int, int], kept: float, compare: str) -> None:
    score = np.random.default_rng(0).random((3, 16))
    mask = select(score, np.ones((3, 16)), ratio=0.1, compare=compare, pattern=pattern)
    assert (~mask).mean() == kept


def test_zero_weights_go_first_within_their_run() -> None:
    score = np.array([[1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]])
    weight = np.array([[1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    mask = select(score, weight, ratio=0.5, compare="row", pattern=(2, 4))
    assert np.flatnonzero(mask).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(("m", "columns"), [(4, 6), (8, 4), (3, 8)])
def test_an_m_that_does_not_divide_the_inputs_is_an_error(m: int, columns: int) -> None:
    with pytest.raises(InvalidValueError, match=f"1:{m}.*divides the {columns} inputs of layer 3 down_proj"):
        select(
            np.ones((2, columns)),
            np.ones((2, columns)),
            ratio=0.5,
            compare="row",
            pattern=(1, m),
            where="layer 3 down_proj",
        )


def test_an_all_zero_metric_is_an_error() -> None:
    with pytest.raises(AllZeroMetricError, match="All-zero metric"):
        select(np.zeros((2, 4)), np.ones((2, 4)), ratio=0.5, compare="row", pattern=(2, 4))


@pytest.mark.parametrize(
    ("text", "pattern"), [("unstructured", None), ("2:4", (2, 4)), ("4:8", (4, 8)), ("1:3", (1, 3))]
)
def test_patterns_are_read(text: str, pattern: tuple[int, int] | None) -> None:
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text", ["", "2", "2:", "4:2", "4:4", "0:4", "-2:4", "2:4:8", " 2:4", "2:4\n", "structured", 24, None]
)
def test_other_patterns_are_errors(text: object) -> None:
    with pytest.raises(InvalidValueError, match="N:M"):
        parse_pattern(text)
