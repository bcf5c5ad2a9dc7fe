"""The weight update: never worse, exactly sparse, and close to the optimum that lstsq finds row by row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronrank_core.kernels import lowest_k
from neuronrank_core.update.least_squares import (
    absorb,
    gradual_shares,
    gradual_update,
    least_squares_update,
    residual_norm,
    row_errors,
)


def layer(seed: int, tokens: int = 200, rows: int = 6, columns: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correlated inputs X, a dense weight and a half-full mask."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(tokens, columns)) @ rng.normal(size=(columns, columns)) * rng.uniform(0.1, 10, columns)
    return X, rng.normal(size=(rows, columns)), rng.random((rows, columns)) < 0.5


def squared_errors(X: np.ndarray, weight: np.ndarray, target: np.ndarray) -> np.ndarray:
    return ((X @ weight.T - target) ** 2).sum(axis=0)


@given(st.integers(0, 10_000), st.sampled_from([3, 12, 200]), st.integers(1, 30))
def test_no_row_gets_worse_and_masked_weights_are_exactly_zero(seed: int, tokens: int, iterations: int) -> None:
    X, W, mask = layer(seed, tokens)
    X[:, 0] = 0  # a feature that never fires
    V = least_squares_update(W, mask, X.T @ X, np.linalg.inv, iterations=iterations)
    assert (V[mask] == 0).all()
    before, after = squared_errors(X, W * ~mask, X @ W.T), squared_errors(X, V, X @ W.T)
    assert (after <= before * (1 + 1e-9)).all()


@given(st.integers(0, 10_000), st.floats(0.2, 0.9))
def test_a_fit_that_would_be_worse_is_not_taken(seed: int, ratio: float) -> None:
    # One iteration on nearly collinear inputs, towards outputs that the masked weights already give.
    X, W, _ = layer(seed)
    mask = np.random.default_rng(seed).random(W.shape) < ratio
    X = X[:, :1] + 0.05 * X
    target = X @ (W * ~mask).T
    V = least_squares_update(W, mask, X.T @ X, np.linalg.inv, target=target.T @ X, iterations=1)
    assert squared_errors(X, V, target) == pytest.approx(0.0, abs=1e-12 * (X**2).sum())


def test_whole_numbers_are_a_weight_too() -> None:
    gram, mask = np.array([[1.0, 0.5], [0.5, 1.0]]), np.array([[False, True]])
    V = least_squares_update(np.ones((1, 2), dtype=int), mask, gram, np.linalg.inv, damping=1.0, iterations=500)
    np.testing.assert_allclose(V, [[1.25, 0.0]])


def test_damping_pulls_towards_the_dense_weight_and_not_towards_zero() -> None:
    # Two inputs of correlation 1/2, both weights 1, the second goes: the best first weight is 1.5, the dense one 1,
    # and damping 1 counts both alike.
    gram = np.array([[1.0, 0.5], [0.5, 1.0]])
    mask = np.array([[False, True]])
    V = least_squares_update(np.ones((1, 2)), mask, gram, np.linalg.inv, damping=1.0, iterations=500)
    np.testing.assert_allclose(V, [[1.25, 0.0]])


def test_reaches_the_optimum_of_every_row() -> None:
    X, W, mask = layer(0)
    V = least_squares_update(W, mask, X.T @ X, np.linalg.inv, damping=1e-9, iterations=3000)
    best = []
    for row, gone in zip(W, mask, strict=True):
        fit = np.linalg.lstsq(X[:, ~gone], X @ row, rcond=None)[0]
        best.append(((X[:, ~gone] @ fit - X @ row) ** 2).sum())
    np.testing.assert_allclose(squared_errors(X, V, X @ W.T), best, rtol=1e-2)


def test_a_few_iterations_already_win_most_of_it() -> None:
    X, W, mask = layer(1)
    V = least_squares_update(W, mask, X.T @ X, np.linalg.inv)
    assert squared_errors(X, V, X @ W.T).sum() < 0.5 * squared_errors(X, W * ~mask, X @ W.T).sum()


@pytest.mark.parametrize("large", [1, 300, 1000, 10_000])
def test_one_large_input_does_not_hide_in_float32_what_the_others_gain(large: float) -> None:
    rng = np.random.default_rng(3)
    X, W = rng.normal(size=(400, 24)) @ rng.normal(size=(24, 24)), rng.normal(size=(40, 24))
    X[:, 5] *= large
    mask = rng.random(W.shape) < 0.1
    mask[:, 5] = False
    W, gram = W.astype(np.float32), (X.T @ X).astype(np.float32)

    def inverse(matrix: np.ndarray) -> np.ndarray:
        return np.linalg.inv(matrix.astype(float)).astype(np.float32)

    V = least_squares_update(W, mask, gram, inverse)
    assert V.dtype == np.float32
    before, after = ((((changed - W) @ X.T.astype(np.float32)) ** 2).sum(1) for changed in (W * ~mask, V))
    some = mask.any(axis=1)
    assert (after[some] < before[some]).all()
    assert after.sum() < 0.6 * before.sum()


@given(st.integers(0, 10_000), st.sampled_from([3, 12, 200]), st.sampled_from([0, 1]))
def test_no_row_gets_worse_where_weights_are_rounded(seed: int, tokens: int, decimals: int) -> None:
    X, W, mask = layer(seed, tokens)
    W = W.round(decimals)
    V = least_squares_update(W, mask, X.T @ X, np.linalg.inv, stored=lambda weight: weight.round(decimals))
    assert np.array_equal(V, V.round(decimals))
    before, after = squared_errors(X, W * ~mask, X @ W.T), squared_errors(X, V, X @ W.T)
    assert (after <= before * (1 + 1e-9)).all()


@given(st.integers(0, 10_000), st.sampled_from([3, 12, 200]))
def test_gradual_is_exactly_sparse_and_no_row_gets_worse(seed: int, tokens: int) -> None:
    X, W, _ = layer(seed, tokens)
    masks = []

    def choose(candidate: np.ndarray, share: float) -> np.ndarray:
        masks.append(lowest_k(np.abs(candidate), int(6 * share)))
        return masks[-1]

    V = gradual_update(W, choose, X.T @ X, np.linalg.inv)
    assert (V[masks[-1]] == 0).all()
    assert [mask[0].sum() for mask in masks] == [2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 5, 6]
    before, after = squared_errors(X, W * ~masks[-1], X @ W.T), squared_errors(X, V, X @ W.T)
    assert (after <= before * (1 + 1e-9)).all()


def test_gradual_with_a_choice_that_is_made_already() -> None:
    X, W, mask = layer(8)
    V = gradual_update(W, lambda candidate, share: mask, X.T @ X, np.linalg.inv)
    assert np.array_equal(V, least_squares_update(W, mask, X.T @ X, np.linalg.inv))


def test_gradual_keeps_a_weight_that_has_taken_over_the_work_of_another() -> None:
    # Inputs a, a, b with weights 0.6, 0.6, 1, of which one may stay: the two smallest together carry 1.2 a.
    gram = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    W = np.array([[0.6, 0.6, 1.0]])
    at_once = least_squares_update(W, lowest_k(np.abs(W), 2), gram, np.linalg.inv)
    np.testing.assert_allclose(at_once, [[0, 0, 1]])
    shares = [0.5] * 20 + [1.0] * 200
    gradual = gradual_update(
        W, lambda V, share: lowest_k(np.abs(V), int(2 * share)), gram, np.linalg.inv, damping=1e-6, shares=shares
    )
    np.testing.assert_allclose(gradual, [[0, 1.2, 0]], atol=1e-4)


@given(st.integers(0, 10_000))
def test_the_residual_norm_is_what_a_regression_on_the_other_inputs_leaves(seed: int) -> None:
    X, _, _ = layer(seed)
    left = []
    for k in range(X.shape[1]):
        others = np.delete(X, k, axis=1)
        left.append(np.linalg.norm(X[:, k] - others @ np.linalg.lstsq(others, X[:, k], rcond=None)[0]))
    np.testing.assert_allclose(residual_norm(X.T @ X, np.linalg.inv, damping=0.0), left, rtol=1e-5)


@given(st.integers(0, 10_000), st.floats(0.01, 3.0))
def test_removing_one_weight_costs_the_square_of_weight_times_residual_norm(seed: int, damping: float) -> None:
    # The damped objective of the update, solved with numpy's lstsq: the damping is a token of its own for each input.
    X, W, _ = layer(seed)
    seen = np.vstack([X, np.diag(damping**0.5 * np.linalg.norm(X, axis=0))])
    norm = residual_norm(X.T @ X, np.linalg.inv, damping=damping)
    for k in (0, 7):
        others = np.delete(seen, k, axis=1)
        fit = np.linalg.lstsq(others, seen @ W[0], rcond=None)[0]
        assert ((others @ fit - seen @ W[0]) ** 2).sum() == pytest.approx((W[0, k] * norm[k]) ** 2, rel=1e-6)


def test_an_input_that_never_fires_has_no_residual() -> None:
    X, _, _ = layer(9)
    X[:, 4] = 0
    norm = residual_norm(X.T @ X, np.linalg.inv)
    assert norm[4] == 0
    assert (np.delete(norm, 4) > 0).all()


def test_shares_grow_to_all_before_the_last_iterations() -> None:
    shares = gradual_shares()
    assert list(shares) == sorted(shares)
    assert shares[11:] == (1.0,) * 5
    assert 8 * shares[0] ** 3 == pytest.approx(shares[7] ** 3)
    assert gradual_shares(8) == shares[1::2]  # The same way in larger steps.
    assert gradual_shares(1) == (1.0,)


def test_without_a_mask_nothing_changes() -> None:
    X, W, _ = layer(2)
    V = least_squares_update(W, np.zeros(W.shape, bool), X.T @ X, np.linalg.inv)
    np.testing.assert_allclose(V, W, rtol=1e-9)


def test_other_targets_than_the_layers_own_outputs() -> None:
    # Inputs lost a feature that the target still knows: the others make up for what they can.
    X, W, mask = layer(3)
    seen = X * (np.arange(X.shape[1]) > 2)
    target = X @ W.T
    V = least_squares_update(W, mask, seen.T @ seen, np.linalg.inv, target=target.T @ seen)
    assert squared_errors(seen, V, target).sum() < squared_errors(seen, W * ~mask, target).sum()


def test_row_errors_are_those_of_the_outputs() -> None:
    X, W, mask = layer(4)
    target = X @ W.T
    errors = row_errors(W * ~mask, X.T @ X, target.T @ X) + (target**2).sum(axis=0)
    np.testing.assert_allclose(errors, squared_errors(X, W * ~mask, target), rtol=1e-9)


def test_scale_of_the_gram_matrix_does_not_matter() -> None:
    X, W, mask = layer(5)
    one, many = (least_squares_update(W, mask, factor * X.T @ X, np.linalg.inv) for factor in (1.0, 1e4))
    np.testing.assert_allclose(one, many, rtol=1e-6, atol=1e-9)


def test_absorb_is_the_least_squares_fit_on_the_kept_inputs() -> None:
    X, W, _ = layer(6)
    kept = np.array([0, 2, 3, 7, 8, 11])
    fit = np.linalg.lstsq(X[:, kept], X @ W.T, rcond=None)[0].T
    np.testing.assert_allclose(absorb(W, kept, X.T @ X, np.linalg.inv, damping=0.0), fit, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("damping", [0.01, 1e6])
def test_damping_holds_the_weights_to_their_dense_values(damping: float) -> None:
    X, W, _ = layer(7)
    kept = np.arange(0, 12, 2)
    drift = np.abs(absorb(W, kept, X.T @ X, np.linalg.inv, damping=damping) - W[:, kept]).max()
    assert drift < 1e-3 if damping > 1 else drift > 1e-3
