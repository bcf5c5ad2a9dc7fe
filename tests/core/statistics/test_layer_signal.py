"""The signal of a layer by hand."""

import numpy as np

from neuronrank_core.statistics.layers import layer_signal


def test_one_minus_the_cosine_of_input_and_output() -> None:
    before = np.array([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    after = np.array([[5.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
    np.testing.assert_allclose(layer_signal(before, after), [0, 1, 1 - np.sqrt(0.5), 2], atol=1e-12)


def test_zero_states() -> None:
    state, zero = np.array([3.0, 4.0]), np.zeros(2)
    np.testing.assert_array_equal(layer_signal([zero, zero, state], [zero, state, zero]), [0, 1, 1])


def test_small_angles_keep_their_digits() -> None:
    angle = 1e-7
    found = layer_signal([[1.0, 0.0]], [[np.cos(angle), np.sin(angle)]])
    np.testing.assert_allclose(found, 2 * np.sin(angle / 2) ** 2, rtol=1e-9)
