"""The inverse in float32, for devices whose float64 is slow, is as good for the update as the one in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from neuronrank_core.update.least_squares import DAMPING, least_squares_update, residual_norm, row_errors
from neuronrank_torch import kernels
from neuronrank_torch.kernels import cholesky_inverse, inverse

#: Tokens, inputs, and how strongly all inputs follow a common one: the last two have condition numbers over 1000.
CASES = [(2000, 300, 0.0), (200, 300, 1.0), (3000, 700, 20.0)]
every_case = pytest.mark.parametrize(("tokens", "inputs", "common"), CASES)


def gram(tokens: int, inputs: int, common: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator) * torch.randn(inputs, generator=generator).exp()
    x += common * torch.randn(tokens, 1, generator=generator)
    return x.T @ x


@every_case
def test_float32_against_numpy(tokens: int, inputs: int, common: float) -> None:
    matrix = gram(tokens, inputs, common)
    unit = matrix / matrix.diagonal().sqrt() / matrix.diagonal().sqrt()[:, None]
    for damping in (DAMPING, 1 + DAMPING):
        damped = (unit + damping * torch.eye(inputs)).tril()
        damped = damped + damped.tril(-1).T  # Rounding has left the two halves a little different.
        exact = np.linalg.inv(damped.double().numpy())
        for found, limit in ((cholesky_inverse(damped), 1e-5), (inverse(damped), 1e-7)):
            assert found.dtype == torch.float32
            assert abs(found.double().numpy() - exact).max() < limit * abs(exact).max()


@every_case
def test_the_update_with_float32_is_that_with_float64(tokens: int, inputs: int, common: float) -> None:
    matrix, weight = gram(tokens, inputs, common), torch.randn(20, inputs, generator=torch.Generator().manual_seed(1))
    mask = abs(weight) < 0.7
    torch.testing.assert_close(
        residual_norm(matrix, cholesky_inverse), residual_norm(matrix.double(), inverse).float(), rtol=1e-5, atol=0
    )
    slow, fast = (least_squares_update(weight, mask, matrix, each) for each in (inverse, cholesky_inverse))
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4 * float(weight.std()))
    exact, target = matrix.double(), weight.double() @ matrix.double()
    lost = [row_errors(v.double(), exact, target) + (target * weight).sum(1) for v in (slow, fast, weight * ~mask)]
    assert not common or (lost[0] < 0.9 * lost[2]).any()
    torch.testing.assert_close(lost[1], lost[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("capability", "slow"), [((9, 0), False), ((8, 0), False), ((8, 9), True), ((7, 5), True)])
def test_cards_without_fast_float64(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], slow: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels._slow_double(torch.device("cuda:0")) is slow
    assert not kernels._slow_double(torch.device("cpu"))
