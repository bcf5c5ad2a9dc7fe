"""Biases are re-fitted with the weights: what is removed keeps its mean, as recomputed from plain passes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from plain import every_family, matrices, plain, weight_of
from pruning import linears, pruned, recipe, seen, small, zeros
from sklearn.linear_model import LinearRegression
from torch import Tensor

from neuronrank_core.update.least_squares import absorb, gradual_update, least_squares_update
from neuronrank_torch.pruning.sparsity_types import neurons, weights

CHOSEN: dict[str, Any] = {"method": "wanda", "nsamples": 24}
BOTH = ("up_proj", "down_proj")
UPDATES = pytest.mark.parametrize("update", ["least-squares", "gradual"])


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Re-fit until nothing changes any more, without damping."""

    def at_once(*arguments: Any, **how: Any) -> Tensor:
        return least_squares_update(*arguments, **{**how, "damping": 1e-6, "iterations": 1000})

    def in_turn(*arguments: Any, **how: Any) -> Tensor:
        return gradual_update(*arguments, **{**how, "damping": 1e-6, "shares": [0.5] * 10 + [1.0] * 1000})

    monkeypatch.setattr(weights, "least_squares_update", at_once)
    monkeypatch.setattr(weights, "gradual_update", in_turn)
    monkeypatch.setattr(neurons, "absorb", partial(absorb, damping=0.0))


def on_the_same_input(dense: Any, model: Any, family: str) -> list[tuple[Tensor, Tensor]]:
    """Outputs of up and down of the first MLP, dense and pruned, on the input of the pruned one."""
    up, down = (matrices(model, family)[0][role] for role in BOTH)
    (x, pre), (_, out) = seen(model, [up, down], recipe(**CHOSEN))
    dense_up, dense_down = (matrices(dense, family)[0][role] for role in BOTH)
    given = iter(x)

    def replaced(module: Any, args: Any) -> Tensor:
        del module
        return next(given).view_as(args[0])

    with dense_up.register_forward_pre_hook(replaced):
        (_, dense_pre), (_, dense_out) = seen(dense, [dense_up, dense_down], recipe(**CHOSEN))
    return [(dense_pre, pre), (dense_out, out)]


@every_family
@UPDATES
@pytest.mark.usefixtures("undamped")
def test_outputs_keep_their_mean(family: str, update: str) -> None:
    dense = plain(family)
    model = copy.deepcopy(dense)
    pruned(model, recipe(**CHOSEN, update=update), batch_size=5)
    for before, after in on_the_same_input(dense, model, family):
        difference = (after - before).flatten(0, 1)
        assert difference.std(dim=0).min() > 0.02  # There is an error, of mean zero.
        assert difference.mean(dim=0).abs().max() < 1e-3


@every_family
@pytest.mark.usefixtures("undamped")
def test_rows_are_regressions_with_an_intercept(family: str) -> None:
    dense = plain(family)
    model = copy.deepcopy(dense)
    pruned(model, recipe(**CHOSEN, update="least-squares"), batch_size=5)
    inputs = [x for x, _ in seen(model, [matrices(model, family)[0][role] for role in BOTH], recipe(**CHOSEN))]
    outputs = on_the_same_input(dense, model, family)
    for role, x, (wanted, given) in zip(BOTH, inputs, outputs, strict=True):
        kept = weight_of(matrices(model, family)[0][role]) != 0
        for row in range(0, len(kept), 7):
            rows, y = x.flatten(0, 1)[:, kept[row]].numpy(), wanted.flatten(0, 1)[:, row].numpy()
            best = np.square(LinearRegression().fit(rows, y).predict(rows) - y).sum()
            assert np.square(given.flatten(0, 1)[:, row].numpy() - y).sum() == pytest.approx(best, rel=2e-2)


@pytest.mark.parametrize("family", ["opt", "gpt2", "xglm"])
@pytest.mark.usefixtures("undamped")
def test_removed_neurons_leave_their_mean_in_the_bias(family: str) -> None:
    dense = plain(family)
    model = copy.deepcopy(dense)
    pruned(model, recipe(nsamples=24, sparsity_type="neurons", sparsity_ratio=0.25, update="least-squares"))
    [(h, _)] = seen(model, [matrices(model, family)[0]["down_proj"]], recipe(**CHOSEN))
    [_, (wanted, _)] = on_the_same_input(dense, model, family)
    best = LinearRegression().fit(h.flatten(0, 1).double().numpy(), wanted.flatten(0, 1).double().numpy())
    down = matrices(model, family)[0]["down_proj"]
    np.testing.assert_allclose(weight_of(down), best.coef_, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(down.bias.detach(), best.intercept_, rtol=1e-2, atol=1e-3)


@UPDATES
def test_biases_of_gated_mlps_and_attention_are_fitted_too(update: str) -> None:
    dense = small("granite", layers=1)
    model = copy.deepcopy(dense)
    pruned(model, recipe(**CHOSEN, update=update, include_attention=True))
    for role, linear in linears(model, 0).items():
        before = linears(dense, 0)[role]
        assert not torch.equal(linear.bias, before.bias)
        assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2


@UPDATES
def test_only_one_reader_of_an_input_has_a_bias(update: str) -> None:
    both = small("granite", layers=1)
    linears(both, 0)["gate_proj"].bias = None
    neither = copy.deepcopy(both)
    linears(neither, 0)["up_proj"].bias = None
    before = linears(both, 0)["up_proj"].bias.clone()
    for model in (both, neither):
        pruned(model, recipe(**CHOSEN, update=update))
    assert linears(both, 0)["gate_proj"].bias is None
    assert not torch.equal(linears(both, 0)["up_proj"].bias, before)
    assert (zeros(both, 0)["gate_proj"] == zeros(neither, 0)["gate_proj"]).all()
    one, other = (linears(model, 0)["gate_proj"].weight for model in (both, neither))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
