"""KL divergence, agreement and standard error against SciPy, and the laws that they obey."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax as scipy_log_softmax
from scipy.special import rel_entr
from scipy.stats import sem

from neuronrank_core.measures import (
    divergence,
    first_within_error,
    kl_divergence,
    log_softmax,
    median_interval,
    perplexity_change,
    perplexity_standard_error,
    same_top,
)


def logits(seed: int, positions: int = 7, vocabulary: int = 23, spread: float = 4.0) -> np.ndarray:
    return spread * np.random.default_rng(seed).normal(size=(positions, vocabulary)) + 100.0


def test_log_softmax_is_that_of_scipy() -> None:
    assert log_softmax(logits(0)) == pytest.approx(scipy_log_softmax(logits(0), axis=-1), rel=1e-12)


@given(st.integers(0, 99), st.floats(0.01, 30.0))
def test_kl_is_the_sum_of_relative_entropies(seed: int, spread: float) -> None:
    p, q = (np.exp(scipy_log_softmax(logits(seed + i, spread=spread), axis=-1)) for i in (0, 1000))
    expected = rel_entr(p, q).sum(axis=-1)
    assert kl_divergence(np.log(p), np.log(q)) == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_kl_where_a_probability_is_zero() -> None:
    half, first = np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]])
    with np.errstate(divide="ignore"):
        log_half, log_first = np.log(half), np.log(first)
    assert kl_divergence(log_first, log_half) == pytest.approx([math.log(2)])
    assert kl_divergence(log_first, log_first) == [0.0]
    assert kl_divergence(log_half, log_first) == [math.inf]


@given(st.integers(0, 99))
def test_kl_is_zero_only_to_itself_and_never_negative(seed: int) -> None:
    p = log_softmax(logits(seed))
    assert (kl_divergence(p, p) == 0.0).all()
    # Far below the rounding errors of the terms: without the bound, about half of the sums are negative.
    assert (kl_divergence(p, p + 1e-17 * logits(seed + 1)) >= 0.0).all()
    assert (kl_divergence(p, log_softmax(logits(seed + 1))) > 0.0).all()


def test_a_sum_of_rounded_terms_is_not_negative() -> None:
    p = np.log(np.full((1, 3), 1 / 3))
    assert kl_divergence(p, np.nextafter(p, 0.0)) == [0.0]


def test_of_ties_the_lowest_index_counts() -> None:
    a = [[1, 3, 3], [3, 1, 3], [0, 0, 0], [1, 2, 3]]
    b = [[0, 9, 1], [0, 1, 9], [1, 0, 0], [1, 3, 2]]
    assert same_top(a, b).tolist() == [True, False, True, False]


def test_summary_of_the_tokens() -> None:
    kl = np.arange(101.0)[::-1] ** 2
    found = divergence(kl, np.arange(101) % 4 == 0, [1.0, 2.0], [1.5, 2.25])
    assert (found.kl_mean, found.kl_p99) == (pytest.approx(3350.0), 99.0**2)
    assert found.agreement == pytest.approx(26 / 101)
    assert (found.perplexity_change, found.perplexity_change_error) == perplexity_change([1.0, 2.0], [1.5, 2.25])


@given(st.lists(st.floats(0.5, 9.0), min_size=2, max_size=20))
def test_standard_error_is_that_of_the_mean_times_the_perplexity(nll: list[float]) -> None:
    expected = math.exp(sum(nll) / len(nll)) * sem(nll)
    assert perplexity_standard_error(nll) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_standard_error_is_the_spread_of_perplexities_of_many_texts() -> None:
    rng = np.random.default_rng(0)
    texts = 3.0 + 0.2 * rng.standard_exponential((2000, 40))
    errors = [perplexity_standard_error(text) for text in texts]
    assert np.mean([e for e in errors if e is not None]) == pytest.approx(np.exp(texts.mean(1)).std(), rel=0.05)


def test_a_single_window_has_no_standard_error() -> None:
    assert perplexity_standard_error([2.0]) is None


def test_the_change_of_a_perplexity_is_compared_in_pairs() -> None:
    rng = np.random.default_rng(3)
    hard = rng.uniform(1.0, 5.0, size=(3000, 24))  # Windows differ much more than the two models do.
    moved = 0.2 + 0.03 * rng.standard_exponential((3000, 24))
    found = [perplexity_change(one, one + by) for one, by in zip(hard, moved, strict=True)]
    assert found[0][0] == pytest.approx(np.exp((hard + moved)[0].mean()) / np.exp(hard[0].mean()) - 1)
    assert np.mean([e for _, e in found if e is not None]) == pytest.approx(np.std([c for c, _ in found]), rel=0.08)
    assert perplexity_change([1.0], [1.5]) == (pytest.approx(math.exp(0.5) - 1), None)


def test_standard_error_of_a_difference_is_the_spread_of_differences_of_many_texts() -> None:
    rng = np.random.default_rng(1)
    texts = 3.0 + 0.5 * rng.standard_exponential((2000, 40))  # Hard windows are hard for both models.
    other = texts + 0.1 + 0.05 * rng.standard_normal(texts.shape)
    errors = [perplexity_standard_error(one, two) for one, two in zip(texts, other, strict=True)]
    spread = (np.exp(texts.mean(1)) - np.exp(other.mean(1))).std()
    assert np.mean([e for e in errors if e is not None]) == pytest.approx(spread, rel=0.05)
    assert perplexity_standard_error(texts[0], texts[0]) == 0.0
    assert perplexity_standard_error([2.0], [3.0]) is None


def test_the_interval_of_nine_values_is_that_of_the_sign_test() -> None:
    values = [5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0]
    assert median_interval(values) == (2.0, 8.0)
    assert median_interval(values[:5]) == (1.0, 9.0)


@pytest.mark.parametrize("n", [6, 9, 20])
def test_the_interval_holds_the_median_as_often_as_it_says(n: int) -> None:
    draws = np.random.default_rng(0).standard_exponential((4000, n))
    bounds = np.array([median_interval(list(row)) for row in draws])
    held = ((bounds[:, 0] <= np.log(2)) & (np.log(2) <= bounds[:, 1])).mean()
    assert 0.94 < held < 0.99


@given(st.integers(1, 5), st.integers(2, 9), st.sampled_from([0.001, 0.1, 1.0]), st.integers(0, 10_000))
def test_a_later_model_has_to_be_better_by_more_than_one_standard_error(
    models: int, windows: int, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    hard = rng.normal(4.0, 1.0, windows)  # Cancels: the error is that of the differences.
    nll = {str(model): hard + rng.normal(0, 0.05) + rng.normal(0, spread, windows) for model in range(models)}
    best = min(nll.values(), key=lambda values: float(values.mean()))
    change = {name: values - best for name, values in nll.items()}
    close = [name for name, by in change.items() if math.expm1(by.mean()) <= math.exp(by.mean()) * sem(by)]
    assert first_within_error(nll) == next(name for name in close if nll[name].mean() <= nll["0"].mean())


def test_what_is_measured_is_chosen_and_what_is_not_is_left() -> None:
    hard = np.array([2.0, 4.0, 6.0])
    clearly = {"good": hard, "better": hard - [0.10, 0.11, 0.12]}
    assert first_within_error(clearly) == "better"
    assert first_within_error({"good": hard, "by chance": hard - [0.3, -0.2, 0.0]}) == "good"
    # The third is the lowest, the second close to it, and the first clearly above both.
    assert first_within_error({**clearly, "third": clearly["better"] - [0.02, -0.02, 0.01]}) == "better"
    # Too uncertain to be worse than the lowest, but above the first.
    wild = hard + np.array([2.0, -1.0, -0.7])
    assert first_within_error({"good": hard, "wild": wild, "better": clearly["better"]}) == "better"
    assert first_within_error({"good": [4.0], "better": [3.9]}) == "better"
