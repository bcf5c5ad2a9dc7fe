"""A bias is fitted as the weight of a constant input: against lstsq and scikit-learn with an intercept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge

from neuronrank_core import Recipe, ScoringContext
from neuronrank_core.kernels import lowest_k
from neuronrank_core.selection.masks import gradual_mask
from neuronrank_core.update.least_squares import absorb, gradual_update, least_squares_update

CONVERGED = {"damping": 1e-9, "iterations": 3000}
seeds = st.integers(0, 10_000)


def layer(seed: int, tokens: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs whose mean is not zero, with a last column of ones; weights with biases; a mask without the biases."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(tokens, 9)) @ rng.normal(size=(9, 9)) + 3 * rng.normal(size=9)
    return np.column_stack([X, np.ones(tokens)]), rng.normal(size=(5, 10)), rng.random((5, 9)) < 0.5


def squared_errors(X: np.ndarray, V: np.ndarray, W: np.ndarray) -> np.ndarray:
    return ((X @ (V - W).T) ** 2).sum(axis=0)


def test_every_row_reaches_the_optimum_with_an_intercept() -> None:
    X, W, mask = layer(0)
    V = least_squares_update(W, mask, X.T @ X, np.linalg.inv, **CONVERGED)
    assert (V[:, :9][mask] == 0).all()
    for v, w, gone in zip(V, W, mask, strict=True):
        kept = X[:, :9][:, ~gone]
        best = LinearRegression().fit(kept, X @ w)
        np.testing.assert_allclose(v[:9][~gone], best.coef_, rtol=1e-3, atol=1e-3)
        assert v[9] == pytest.approx(best.intercept_, rel=1e-3, abs=1e-3)


@given(seeds)
def test_the_outputs_keep_their_mean(seed: int) -> None:
    X, W, mask = layer(seed)
    masked = W * np.column_stack([~mask, np.ones(5, bool)])
    V = least_squares_update(W, mask, X.T @ X, np.linalg.inv, **CONVERGED)
    before, after = (np.abs((X @ (weights - W).T).mean(axis=0)) for weights in (masked, V))
    assert after.max() < 1e-2 * before.max()


def test_a_bias_is_damped_towards_its_dense_value() -> None:
    # An input that is always 1 is removed. A bias of 2 would replace it, the dense one is 1; damping 1 gives the mean.
    X = np.ones((4, 2))
    V = least_squares_update(np.ones((1, 2)), np.array([[True]]), X.T @ X / 4, np.linalg.inv, damping=1.0)
    np.testing.assert_allclose(V, [[0, 1.5]], rtol=1e-4)


@given(seeds, st.sampled_from([12, 200]))
def test_gradual_never_removes_a_bias_and_no_row_gets_worse(seed: int, tokens: int) -> None:
    X, W, _ = layer(seed, tokens)
    W[:, 9] *= 1e-3  # the smallest of all
    masks = []

    def choose(candidate: np.ndarray, share: float) -> np.ndarray:
        assert candidate.shape == (5, 10)
        masks.append(lowest_k(np.abs(candidate[:, :9]), int(5 * share)))
        return masks[-1]

    V = gradual_update(W, choose, X.T @ X, np.linalg.inv)
    assert (V[:, :9][masks[-1]] == 0).all()
    assert (V != 0).sum() == 5 * (4 + 1)
    masked = W * np.column_stack([~masks[-1], np.ones(5, bool)])
    assert (squared_errors(X, V, W) <= squared_errors(X, masked, W) * (1 + 1e-9)).all()


def test_a_bias_is_not_scored() -> None:
    rng = np.random.default_rng(0)
    W, candidate = rng.normal(size=(5, 9)), rng.normal(size=(5, 10)) * np.logspace(0, 3, 10)
    context = ScoringContext(0, Recipe(method="magnitude"), {"up_proj": W}, None)
    mask = gradual_mask("up_proj", context, np.ones(9), candidate, 1.0)
    assert np.array_equal(mask, lowest_k(np.abs(candidate[:, :9]).reshape(1, -1), 22).reshape(5, 9))


@given(seeds)
def test_neurons_are_absorbed_as_by_a_regression_with_an_intercept(seed: int) -> None:
    X, W, _ = layer(seed)
    kept = np.array([0, 2, 3, 7, 9])
    V = absorb(W, kept, X.T @ X, np.linalg.inv, damping=0.0)
    best = LinearRegression().fit(X[:, kept[:-1]], X @ W.T)
    np.testing.assert_allclose(V[:, :-1], best.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(V[:, -1], best.intercept_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose((X[:, kept] @ V.T - X @ W.T).mean(axis=0), 0, atol=1e-8)
    # A bias never makes the fit worse: the same fit with the dense bias is one of those that it chooses from.
    held = absorb(W[:, :9], kept[:-1], X[:, :9].T @ X[:, :9], np.linalg.inv, damping=0.0)
    without = ((X[:, kept[:-1]] @ held.T - X[:, :9] @ W[:, :9].T) ** 2).sum(axis=0)
    assert (((X[:, kept] @ V.T - X @ W.T) ** 2).sum(axis=0) <= without * (1 + 1e-9)).all()


@pytest.mark.parametrize("damping", [0.3, 20.0])
def test_damped_neurons_are_absorbed_as_by_a_ridge_regression(damping: float) -> None:
    X, W, _ = layer(1)
    kept, gone = np.array([0, 2, 3, 7, 9]), np.array([1, 4, 5, 6, 8])
    V = absorb(W, kept, X.T @ X, np.linalg.inv, damping=damping)
    scale = np.sqrt((X**2).sum(axis=0))[kept]  # The constant is an input among others.
    change = Ridge(alpha=damping, fit_intercept=False).fit(X[:, kept] / scale, X[:, gone] @ W[:, gone].T).coef_
    np.testing.assert_allclose(V, W[:, kept] + change / scale, rtol=1e-6, atol=1e-9)
