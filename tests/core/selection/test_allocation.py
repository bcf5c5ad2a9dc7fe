"""Ratios between layers: errors against brute force, and the laws of the allocation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import random_layer, seeds

from neuronrank_core import (
    AllZeroMetricError,
    InvalidValueError,
    MissingStatisticsError,
    NonFiniteError,
    Recipe,
    prune_mask,
)
from neuronrank_core.selection.allocation import (
    LOG2_EDGES,
    allocate,
    error_gain,
    error_histogram,
    random_error,
    removal_error,
    typical_gain,
)

LAYER = random_layer(2)
CONTEXT = LAYER.context(Recipe(method="wanda"))
HIDDEN = np.concatenate([d.hidden for d in LAYER.documents])
ratios = st.floats(0, 1)


def histograms(seed: int, layers: int = 4, size: int = 1000) -> tuple[list[np.ndarray], np.ndarray]:
    """Histograms of layers that differ in the size of their errors, and the logarithms they count."""
    rng = np.random.default_rng(seed)
    logs = rng.normal(size=(layers, size)) * 3 + rng.normal(size=(layers, 1)) * 4
    return [np.histogram(row, LOG2_EDGES)[0] for row in logs], logs


def zeros(layer: int, ratio: float) -> int:
    del layer
    return int(ratio * 1000)


def test_the_error_in_down_is_that_of_zeroing_the_weight() -> None:
    down = LAYER.weights["down_proj"]
    error = removal_error("down_proj", CONTEXT)
    for row, column in np.ndindex(down.shape):
        without = down.copy()
        without[row, column] = 0
        change = HIDDEN @ (down - without).T
        assert error[row, column] == pytest.approx((change**2).sum(axis=1).mean(), rel=1e-5)


@pytest.mark.parametrize("module", ["gate_proj", "up_proj"])
def test_a_whole_row_costs_what_its_neuron_brings(module: str) -> None:
    contribution = HIDDEN[:, :, None] * LAYER.weights["down_proj"].T
    expected = (contribution**2).sum(axis=2).mean(axis=0)
    np.testing.assert_allclose(removal_error(module, CONTEXT).sum(axis=1), expected, rtol=1e-5)


@pytest.mark.parametrize("module", ["gate_proj", "up_proj"])
def test_within_a_row_errors_are_those_of_the_rows_own_output(module: str) -> None:
    x = np.concatenate([d.x for d in LAYER.documents])
    own = LAYER.weights[module] ** 2 * (x**2).mean(axis=0)
    error = removal_error(module, CONTEXT)
    np.testing.assert_allclose(error / error[:, :1], own / own[:, :1], rtol=1e-5)


def test_a_dead_neuron_costs_nothing() -> None:
    weights = {**LAYER.weights, "up_proj": LAYER.weights["up_proj"].copy()}
    weights["up_proj"][3] = 0
    assert not removal_error("up_proj", replace(CONTEXT, weights=weights))[3].any()


def test_a_histogram_counts_every_weight_once_and_halves_with_the_residual() -> None:
    one, two = (error_histogram(CONTEXT, residual) for residual in (1.0, 2.0))
    assert one.sum() == sum(LAYER.weights[name].size for name in ("gate_proj", "up_proj", "down_proj"))
    # Sixteen bins to a factor of two; sums decide at the edges of bins.
    assert abs(np.cumsum(one)[16:] - np.cumsum(two)[:-16]).max() <= 1


@pytest.mark.parametrize("residual", [0.0, -1.0, float("nan"), float("inf")])
def test_a_residual_that_is_no_size_is_refused(residual: float) -> None:
    with pytest.raises(NonFiniteError, match="layer 3"):
        error_histogram(CONTEXT, residual)


@given(seeds, ratios, ratios, ratios)
def test_total_is_kept_and_bounds_hold(seed: int, ratio: float, blend: float, bound: float) -> None:
    counts, _ = histograms(seed)
    chosen = allocate(counts, ratio, zeros, blend=blend, bound=bound)
    assert sum(zeros(i, r) for i, r in enumerate(chosen)) == 4 * zeros(0, ratio)
    assert all(max(0, ratio - bound) <= r <= min(1, ratio + bound) for r in chosen)


@given(seeds, st.floats(0.1, 0.9), st.integers(2, 60))
def test_rows_of_equal_counts_reach_the_nearest_total_below(seed: int, ratio: float, columns: int) -> None:
    def by_rows(layer: int, of: float) -> int:
        del layer
        return 7 * int(of * columns)

    chosen = allocate(histograms(seed)[0], ratio, by_rows)
    assert sum(by_rows(i, r) for i, r in enumerate(chosen)) == 4 * by_rows(0, ratio)


@given(seeds, st.floats(0.05, 0.95))
def test_unbounded_and_unblended_it_is_one_threshold(seed: int, ratio: float) -> None:
    counts, logs = histograms(seed)
    expected = (logs < np.quantile(logs, ratio)).mean(axis=1)
    np.testing.assert_allclose(allocate(counts, ratio, zeros, blend=1, bound=1), expected, atol=0.02)


@given(st.floats(0.05, 0.95), st.integers(0, 3), st.integers(16, 64))
def test_a_layer_whose_errors_matter_less_gives_up_more(ratio: float, layer: int, bins: int) -> None:
    same = [histograms(0, layers=1)[0][0]] * 4
    less = [np.roll(h, -bins) if i == layer else h for i, h in enumerate(same)]
    uniform, chosen = allocate(same, ratio, zeros), allocate(less, ratio, zeros)
    assert np.ptp(uniform) <= 2e-3
    assert all(chosen[layer] > chosen[other] + 2e-3 for other in range(4) if other != layer)


def test_nothing_to_go_by_is_an_error() -> None:
    dead = np.zeros(len(LOG2_EDGES) - 1, dtype=np.int64)
    dead[0] = 1000
    with pytest.raises(AllZeroMetricError):
        allocate([dead, dead], 0.5, zeros)


def test_the_context_says_how_much_of_the_mlp_goes() -> None:
    context = replace(LAYER.context(Recipe(method="wanda", sparsity_ratio=0.5)), ratio=0.25)
    assert prune_mask("gate_proj", context).mean() == 0.25
    assert prune_mask("q_proj", context).mean() == 0.5


@pytest.mark.parametrize("kind", ["2:4", "neurons"])
def test_fixed_patterns_leave_nothing_to_allocate(kind: str) -> None:
    with pytest.raises(InvalidValueError, match="allocate"):
        Recipe(allocate="neuronrank", sparsity_type=kind)


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_an_error_is_an_eighth_of_each_tokens_output(seed: int, scale: float) -> None:
    output = np.random.default_rng(seed).normal(size=(5, 12)) * scale
    output[2] = 0
    error = random_error(output, seed)
    np.testing.assert_allclose(np.linalg.norm(error, axis=1), np.linalg.norm(output, axis=1) / 8, rtol=1e-5)
    assert np.array_equal(error, random_error(output, seed))
    assert not np.array_equal(error, random_error(output, seed + 1))


@given(seed=seeds, factor=st.floats(1e-3, 1e3), rounding=st.floats(-1e-3, 1e-3))
def test_the_gain_of_a_factor_is_its_square(seed: int, factor: float, rounding: float) -> None:
    error = np.random.default_rng(seed).normal(size=(5, 12))
    assert error_gain(factor * error, error) == pytest.approx(factor**2, rel=0.03)
    assert error_gain((1 + rounding) * error, error) == 1


def test_an_error_that_does_not_arrive_has_no_gain() -> None:
    assert error_gain(np.zeros((2, 3)), np.ones((2, 3))) == 0
    assert error_gain(np.zeros((2, 3)), np.zeros((2, 3))) == 1


def test_documents_without_a_gain_do_not_count() -> None:
    assert typical_gain([1.0, np.nan, 4.0]) == 2.5
    with pytest.raises(MissingStatisticsError, match="in none of the documents"):
        typical_gain([np.nan, np.nan], 3)
