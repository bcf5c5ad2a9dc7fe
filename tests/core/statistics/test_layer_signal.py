"""The signal of a layer by hand."""

import numpy as np

from neuronrank_core.statistics.layers import layer_signal


def test_one_minus_the_cosine_of_input_and_output() -> None:
    before = np.array([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    after = np.array([[5.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
    np.testing.assert_allclose(layer_signal(before, after), [0, 1, 1 - np.sqrt(0.5), 2], atol=1e-12)
