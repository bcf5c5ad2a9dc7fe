"""Inputs that are removed one after another: the same weights as a direct solve, the order of an exhaustive search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from neuronrank_core.update.least_squares import absorb, eliminate

RNG = np.random.default_rng(8)
INPUTS = RNG.normal(size=(40, 7)) @ (np.eye(7) + 0.8 * RNG.normal(size=(7, 7)))
INPUTS[:, 5] = 2 * INPUTS[:, 1] + 0.1 * RNG.normal(size=40)  # Each strong, and each can replace the other.
WEIGHT = RNG.normal(size=(3, 7))


def loss(weight: np.ndarray, kept: list[int], damping: float) -> float:
    """Squared error of the re-fitted weights and what they pay for leaving the dense ones, by a direct solve."""
    scale = np.sqrt((INPUTS**2).sum(axis=0))
    x, w = INPUTS / scale, weight * scale
    fitted = np.zeros_like(w)
    own = x[:, kept]
    fitted[:, kept] = np.linalg.solve(
        own.T @ own + damping * np.eye(len(kept)), own.T @ x @ w.T + damping * np.eye(7)[kept] @ w.T
    ).T
    return float(((x @ (w - fitted).T) ** 2).sum() + damping * ((w - fitted) ** 2).sum())


def least(weight: np.ndarray, norm: np.ndarray, rest: Sequence[int], count: int) -> list[int]:
    cost = np.sqrt((weight**2).sum(axis=0)) * norm
    return sorted(rest, key=lambda i: cost[i])[:count]


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_order_is_that_of_an_exhaustive_search(damping: float) -> None:
    left, expected = list(range(7)), []
    for _ in range(4):
        costs = {i: loss(WEIGHT, [j for j in left if j != i], damping) for i in left}
        expected.append(min(costs, key=lambda i: costs[i]))
        left.remove(expected[-1])

    gram = INPUTS.T @ INPUTS
    assert eliminate(WEIGHT, gram, least, 4, np.linalg.inv, damping=damping, block=1) == expected
    strength = np.sqrt((WEIGHT**2).sum(axis=0) * gram.diagonal())
    assert np.argsort(strength)[:4].tolist() != expected


@pytest.mark.parametrize("block", [1, 3, 16])
def test_weights_on_the_way_are_those_of_one_solve(block: int) -> None:
    gram, seen, order = INPUTS.T @ INPUTS, [], [5, 2, 0, 6, 1]

    def choose(weight: np.ndarray, norm: np.ndarray, rest: Sequence[int], count: int) -> list[int]:
        gone = sum(len(new) for _, new in seen)
        kept = [i for i in range(7) if i not in order[:gone]]
        np.testing.assert_allclose(weight[:, kept], absorb(WEIGHT, np.array(kept), gram, np.linalg.inv), rtol=1e-8)
        assert list(rest) == kept
        assert (norm > 0).all()
        seen.append((gone, order[gone : gone + count]))
        return seen[-1][1]

    assert eliminate(WEIGHT, gram, choose, 5, np.linalg.inv, block=block) == order
    assert len(seen) == -(-5 // block)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_inputs_that_are_always_zero_go_first_in_any_unit(unit: float) -> None:
    inputs = unit * INPUTS
    inputs[:, [2, 4]] = 0
    order = eliminate(WEIGHT, inputs.T @ inputs, least, 4, np.linalg.inv, block=1)
    assert order[:2] == [2, 4]
    alive = [i for i in range(7) if i not in (2, 4)]
    same = eliminate(WEIGHT[:, alive], INPUTS[:, alive].T @ INPUTS[:, alive], least, 2, np.linalg.inv, block=1)
    assert order[2:] == [alive[i] for i in same]
