"""A change of a layer's output, carried back to the output of its MLP through a norm or a factor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronrank_core.update.through_norm import (
    FLOOR,
    carried_back,
    explained,
    feature_gain,
    feature_inverse,
    feature_sums,
    token_gain,
)

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, tokens: int = 50, features: int = 9) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """Gains of features, none small, and errors of tokens of very different sizes."""
    rng = np.random.default_rng(seed)
    gains = rng.uniform(0.6, 2, features) * rng.choice([-1, 1], features)
    return rng, gains, rng.standard_normal((tokens, features)) * 10 ** rng.uniform(-3, 3, (tokens, 1))


@given(SEEDS)
def test_gains_of_tokens_and_features_are_undone(seed: int) -> None:
    rng, gains, error = drawn(seed)
    error = np.sign(error) * np.abs(error[:, :1])  # As large in each feature, so that tokens and features separate.
    effect = rng.uniform(0.01, 100, (len(error), 1)) * gains
    sums = feature_sums(effect * error, error)
    assert explained(sums) == pytest.approx(1)
    wanted = rng.standard_normal(error.shape)
    found = carried_back(wanted * effect, token_gain(effect * error, error), feature_inverse(feature_gain(sums)))
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


@given(SEEDS, st.floats(1e-3, 1e3), st.booleans())
def test_a_factor_is_divided_by(seed: int, factor: float, negative: bool) -> None:
    rng, _, error = drawn(seed)
    factor = -factor if negative else factor
    sums = feature_sums(factor * error, error)
    assert explained(sums) == pytest.approx(1)
    lost = rng.standard_normal(error.shape)
    found = carried_back(lost, token_gain(factor * error, error), feature_inverse(feature_gain(sums)))
    np.testing.assert_allclose(found, lost / factor, rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_an_rms_norm_is_undone_up_to_what_it_ignores(seed: int) -> None:
    rng, gains, _ = drawn(seed)
    gains = rng.uniform(0.6, 2, 300)
    output = rng.standard_normal((200, 300)) * 10 ** rng.uniform(-2, 2, (200, 1))

    def norm(y: np.ndarray) -> np.ndarray:
        return np.asarray(y / np.sqrt(np.square(y).mean(axis=1, keepdims=True)) * gains)

    error = 0.01 * output * rng.standard_normal(output.shape)
    sums = feature_sums(norm(output + error) - norm(output), error)
    assert explained(sums) > 0.8
    wanted = 0.01 * rng.standard_normal(output.shape) * np.abs(output)
    lost = norm(output + wanted) - norm(output)
    found = carried_back(
        lost, token_gain(norm(output + error) - norm(output), error), feature_inverse(feature_gain(sums))
    )
    assert np.linalg.norm((found - wanted) / output) < 0.2 * np.linalg.norm(wanted / output)


def test_small_gains_are_not_divided_by() -> None:
    inverse = feature_inverse(np.array([100.0, 2.0, 2.0, -2.0, 1e-3, 0.0]))
    np.testing.assert_allclose(inverse, [1 / 100, 1 / 2, 1 / 2, -1 / 2, 1e-3 / (FLOOR * 4), 0], rtol=1e-12)


def test_without_an_error_nothing_is_changed() -> None:
    none = np.zeros((2, 3))
    sums = feature_sums(none, none)
    assert explained(sums) == 1
    assert token_gain(none, none).tolist() == [0, 0]
    assert (
        carried_back(np.ones((2, 3)), token_gain(none, none), feature_inverse(feature_gain(sums))).tolist()
        == none.tolist()
    )


@given(SEEDS, st.integers(0, 50))
def test_sums_of_two_texts_are_added(seed: int, cut: int) -> None:
    rng, gains, error = drawn(seed)
    change = error * gains + 0.1 * rng.standard_normal(error.shape)
    parts = feature_sums(change[:cut], error[:cut]) + feature_sums(change[cut:], error[cut:])
    np.testing.assert_allclose(parts, feature_sums(change, error), atol=1e-12)


@given(SEEDS)
def test_a_change_of_other_features_is_not_explained(seed: int) -> None:
    _, _, error = drawn(seed, tokens=400)
    assert explained(feature_sums(np.roll(error, 1, axis=1), error)) < 0.1
