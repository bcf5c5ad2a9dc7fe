"""Which weights go: exactly k of each comparison group, ties to the lowest index, zero weights first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from neuronrank_core import AllZeroMetricError, InvalidValueError, NonFiniteError, lowest_k, select

#: Scores with few different values, so that most of them tie; at least one is not zero.
scores = arrays(
    np.float64, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.integers(0, 3).map(float)
).map(lambda s: s if s.any() else s + 1)
ratios = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0]))


def lowest_by_hand(values: list[float], k: int) -> set[int]:
    """Indices of the k lowest values; of equal values the lowest index comes first."""
    return {index for _, index in sorted((value, index) for index, value in enumerate(values))[:k]}


@given(scores, st.data())
def test_lowest_k(s: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, s.shape[1]))
    mask = lowest_k(s, k)
    assert mask.dtype == bool
    for row, marked in zip(s.tolist(), mask, strict=True):
        assert set(np.flatnonzero(marked)) == lowest_by_hand(row, k)


@given(scores, ratios, st.data())
def test_exactly_k_of_the_module(s: np.ndarray, ratio: float, data: st.DataObject) -> None:
    weight = data.draw(arrays(np.float64, s.shape, elements=st.integers(0, 2).map(float)))
    mask = select(s.copy(), weight, ratio=ratio, compare="module")
    k = int(ratio * s.size)
    assert mask.sum() == k
    assert mask.shape == s.shape
    merit = np.where(weight == 0, -np.inf, s).ravel().tolist()
    assert set(np.flatnonzero(mask)) == lowest_by_hand(merit, k)


@given(scores, ratios, st.data())
def test_exactly_k_of_every_row(s: np.ndarray, ratio: float, data: st.DataObject) -> None:
    weight = data.draw(arrays(np.float64, s.shape, elements=st.integers(0, 2).map(float)))
    mask = select(s.copy(), weight, ratio=ratio, compare="row")
    merit = np.where(weight == 0, -np.inf, s)
    for row, marked in zip(merit.tolist(), mask, strict=True):
        assert set(np.flatnonzero(marked)) == lowest_by_hand(row, int(ratio * s.shape[1]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_finite_scores_whose_sum_overflows(dtype: type) -> None:
    s = np.full((4, 4), np.finfo(dtype).max, dtype)
    assert select(s, np.ones_like(s), ratio=0.5, compare="row").sum() == 8
    for bad in (np.nan, np.inf, -np.inf):
        s = np.ones((2, 2), dtype)
        s[1, 0] = bad
        with pytest.raises(NonFiniteError):
            select(s, np.ones_like(s), ratio=0.5, compare="row")


@pytest.mark.parametrize(
    ("how", "message"),
    [({"ratio": -0.25, "compare": "row"}, "ratio is -0.25"), ({"ratio": 0.5, "compare": "x"}, "compare is 'x'")],
)
def test_what_does_not_exist_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        select(np.ones((2, 2)), np.ones((2, 2)), **how)
    for k in (-1, 3):
        with pytest.raises(InvalidValueError, match=f"k is {k}"):
            lowest_k(np.ones((2, 2)), k)


@given(scores, st.sampled_from(["module", "row", "column"]))
def test_ratio_0_takes_nothing_and_ratio_1_everything(s: np.ndarray, compare: str) -> None:
    assert not select(s.copy(), np.ones_like(s), ratio=0.0, compare=compare).any()
    assert select(s.copy(), np.ones_like(s), ratio=1.0, compare=compare).all()


@given(scores, st.floats(0, 1), st.floats(0, 1), st.sampled_from(["module", "row", "column"]))
def test_a_higher_ratio_takes_more_of_the_same(s: np.ndarray, one: float, other: float, compare: str) -> None:
    few, many = (select(s.copy(), np.ones_like(s), ratio=r, compare=compare) for r in sorted((one, other)))
    assert not (few & ~many).any()


def test_zero_weights_count_toward_the_target_and_go_first() -> None:
    score = np.array([[1.0, 2.0, 3.0, 4.0]])
    weight = np.array([[9.0, 9.0, 9.0, 0.0]])
    assert select(score.copy(), weight, ratio=0.5, compare="row").tolist() == [[True, False, False, True]]
    assert select(score.copy(), weight, ratio=0.25, compare="module").tolist() == [[False, False, False, True]]


def test_a_zero_weight_goes_before_a_score_of_zero() -> None:
    score, weight = np.array([[0.0, 5.0, 1.0]]), np.array([[1.0, 0.0, 1.0]])
    assert select(score, weight, ratio=0.34, compare="row").tolist() == [[False, True, False]]


@pytest.mark.parametrize("compare", ["module", "row"])
def test_an_all_zero_metric_is_an_error_that_says_what_to_try(compare: str) -> None:
    with pytest.raises(AllZeroMetricError, match="All-zero metric in layer 3 up_proj") as error:
        select(np.zeros((2, 4)), np.ones((2, 4)), ratio=0.5, compare=compare, where="layer 3 up_proj")
    assert "--nsamples" in error.value.hint
    assert "--nr-q-active" in error.value.hint
    assert "calibration data" in error.value.hint


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_non_finite_score_is_an_error(value: float, ratio: float) -> None:
    with pytest.raises(NonFiniteError, match="layer 3 up_proj"):
        select(np.array([[1.0, value]]), np.ones((1, 2)), ratio=ratio, compare="row", where="layer 3 up_proj")


@given(scores, st.floats(0, 1))
def test_a_column_is_a_row_of_the_transpose(s: np.ndarray, ratio: float) -> None:
    weight = np.ones(s.shape)
    columns = select(s.copy(), weight, ratio=ratio, compare="column")
    assert np.array_equal(columns.T, select(s.T.copy(), weight.T, ratio=ratio, compare="row"))
