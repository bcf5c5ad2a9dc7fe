"""The signal of a head against loops over its own columns."""

from math import sqrt

import numpy as np

from neuronrank_core.statistics.heads import head_signal


def test_norm_of_what_each_head_adds_at_each_token() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(5, 6)), rng.normal(size=(7, 6))  # Two heads of three outputs.
    found = head_signal(x, weight, heads=2)
    assert found.shape == (5, 2)
    for t in range(5):
        for head in range(2):
            added = [sum(weight[i, c] * x[t, c] for c in range(3 * head, 3 * head + 3)) for i in range(7)]
            np.testing.assert_allclose(found[t, head], sqrt(sum(a * a for a in added)), rtol=1e-12)
