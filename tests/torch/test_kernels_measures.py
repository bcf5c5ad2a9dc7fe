"""KL divergence and agreement on tensors equal the core's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuronrank_core import measures
from neuronrank_torch.kernels import kl_divergence, same_top


@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
def test_kl_divergence_is_that_of_the_core(spread: float) -> None:
    a, b = (spread * torch.randn(9, 301, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    a[2, 5] = -torch.inf
    a[3, 6] = b[3, 6] = -torch.inf
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    expected = measures.kl_divergence(measures.log_softmax(a.numpy()), measures.log_softmax(b.numpy()))
    assert kl_divergence(p, q).numpy() == pytest.approx(expected, rel=2e-5, abs=1e-6)
    b[4, 7] = -torch.inf
    infinite = kl_divergence(torch.zeros_like(a).log_softmax(-1), b.log_softmax(-1))
    assert infinite.isinf().tolist() == [row in (3, 4) for row in range(9)]


def test_kl_divergence_is_never_negative_and_zero_to_itself() -> None:
    p = torch.randn(500, 301, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert (kl_divergence(p, p) == 0).all()
    assert (kl_divergence(p, torch.nextafter(p, torch.zeros(()))) >= 0).all()


def test_same_top_is_that_of_the_core_in_half_precision_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ((torch.randn(400, 60, generator=generator).bfloat16() * 2).round() for _ in range(2))
    found = same_top(a.float(), b.float())
    assert np.array_equal(found.numpy(), measures.same_top(a.float().numpy(), b.float().numpy()))
    assert 0 < found.sum() < 400
