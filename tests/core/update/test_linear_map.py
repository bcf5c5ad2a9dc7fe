"""The map of all inputs to other outputs, against NumPy's least squares."""

import numpy as np

from neuronrank_core.update.least_squares import linear_map

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 4)) * np.array([1.0, 10.0, 0.1, 3.0])
Y = RNG.normal(size=(50, 3))
W = RNG.normal(size=(3, 4))


def test_without_damping_it_is_least_squares() -> None:
    found = linear_map(W, X.T @ X, Y.T @ X, np.linalg.inv, damping=0.0)
    np.testing.assert_allclose(found, np.linalg.lstsq(X, Y, rcond=None)[0].T, rtol=1e-8)


def test_damping_is_a_ridge_towards_the_given_weights() -> None:
    # The same as further rows of inputs, each a scaled unit vector, whose outputs are those of the given weights.
    rows = np.diag(np.sqrt(0.3 * (X**2).sum(axis=0)))
    more, goal = np.vstack([X, rows]), np.vstack([Y, rows @ W.T])
    found = linear_map(W, X.T @ X, Y.T @ X, np.linalg.inv, damping=0.3)
    np.testing.assert_allclose(found, np.linalg.lstsq(more, goal, rcond=None)[0].T, rtol=1e-8)
