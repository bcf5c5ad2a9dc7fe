"""The update from few tokens: none without tokens, today's in the limit of many, and in between a larger damping."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronrank_core.update.few_tokens import shrunk_gram, shrunk_target, trust
from neuronrank_core.update.least_squares import (
    DAMPING,
    absorb,
    eliminate,
    gradual_update,
    least_squares_update,
    linear_map,
    residual_norm,
)

RNG = np.random.default_rng(4)
KEPT = np.array([0, 2, 3, 6])
MASK = RNG.random((5, 7)) < 0.4


def layer(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, the Gram matrix of correlated inputs, and products with outputs that are not the layer's own."""
    rng = np.random.default_rng(3)
    X = rng.normal(size=(tokens, 7)) @ rng.normal(size=(7, 7))
    W = rng.normal(size=(5, 7))
    return W, X.T @ X, (X @ W.T + rng.normal(size=(tokens, 5))).T @ X


@given(st.integers(0, 10**7), st.integers(1, 10**5))
def test_trust_grows_with_tokens_and_falls_with_inputs(tokens: int, inputs: int) -> None:
    assert 0 <= trust(tokens, inputs) <= trust(tokens + 1, inputs) <= 1
    assert trust(tokens + 1, inputs + 1) <= trust(tokens + 1, inputs)
    if tokens < 1000 * inputs:  # Where rounding does not hide it.
        assert trust(tokens, inputs) < trust(tokens + 1, inputs) < 1
    # Only tokens per input matter.
    assert trust(3 * tokens, 3 * inputs) == pytest.approx(trust(tokens, inputs))


@given(st.integers(1, 10**5))
def test_trust_is_nothing_without_tokens_and_whole_in_the_limit(inputs: int) -> None:
    assert trust(0, inputs) == 0
    assert trust(10**12, inputs) == pytest.approx(1, abs=1e-6)


def test_without_tokens_the_weights_are_exactly_unchanged() -> None:
    W, G, T = layer(0)
    G, T = shrunk_gram(G, 0), shrunk_target(T, W, G, 0)
    masked = np.where(MASK, 0, W)
    assert np.array_equal(least_squares_update(W, MASK, G, np.linalg.inv), masked)
    assert np.array_equal(least_squares_update(W, MASK, G, np.linalg.inv, target=T), masked)
    assert np.array_equal(gradual_update(W, lambda *_: MASK, G, np.linalg.inv, target=T), masked)
    assert np.array_equal(absorb(W, KEPT, G, np.linalg.inv), W[:, KEPT])


def test_as_tokens_become_few_the_weights_approach_the_unchanged_ones() -> None:
    W, G, T = layer(40)
    changes = []
    for tokens in (1000, 100, 10, 1, 0):
        fitted = linear_map(W, shrunk_gram(G, tokens), shrunk_target(T, W, G, tokens), np.linalg.inv)
        changes.append(np.abs(fitted - W).max())
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] < 1e-12 < changes[0]


def test_with_very_many_tokens_it_is_the_update_of_all_tokens() -> None:
    W, G, T = layer(40)
    for tokens, tolerance in ((10**6, 1e-4), (10**12, 1e-9)):
        few = least_squares_update(
            W, MASK, shrunk_gram(G, tokens), np.linalg.inv, target=shrunk_target(T, W, G, tokens)
        )
        np.testing.assert_allclose(few, least_squares_update(W, MASK, G, np.linalg.inv, target=T), rtol=tolerance)


@pytest.mark.parametrize("tokens", [2, 9, 200])
def test_it_is_a_larger_damping(tokens: int) -> None:
    W, G, T = layer(40)
    damping = (1 + DAMPING) / trust(tokens, 7) - 1
    assert damping > DAMPING
    shrunk = shrunk_gram(G, tokens)
    np.testing.assert_allclose(
        absorb(W, KEPT, shrunk, np.linalg.inv), absorb(W, KEPT, G, np.linalg.inv, damping=damping)
    )
    np.testing.assert_allclose(
        linear_map(W, shrunk, shrunk_target(T, W, G, tokens), np.linalg.inv),
        linear_map(W, G, T, np.linalg.inv, damping=damping),
    )

    def choose(weight: np.ndarray, norm: np.ndarray, rest: Sequence[int], count: int) -> list[int]:
        cost = np.abs(weight).sum(0) * norm
        return sorted(rest, key=lambda i: cost[i])[:count]

    assert eliminate(W, shrunk, choose, 4, np.linalg.inv, block=1) == eliminate(
        W, G, choose, 4, np.linalg.inv, damping=damping, block=1
    )


def test_without_tokens_per_input_a_residual_is_the_norm_of_the_input() -> None:
    _, G, _ = layer(40)
    alone = residual_norm(shrunk_gram(G, 0), np.linalg.inv, damping=0.0)
    np.testing.assert_allclose(alone, np.sqrt(G.diagonal()))
    assert (residual_norm(G, np.linalg.inv, damping=0.0) < alone).all()
