"""Ratios between layers on real forwards: the total stays, and layers that matter less give up more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning import MLP, pruned, recipe, small, zeros

from neuronrank_core.selection.allocation import typical_square_norm
from neuronrank_torch.calibration.hidden_states import residual_norm

LAYERS = 3


def share(chosen: str, scale: float, **options: object) -> list[float]:
    """Share of zeros in the MLP of each layer, where the middle one's output is scaled."""
    model = small(layers=LAYERS)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(scale)
    pruned(model, recipe(allocate=chosen, **options))
    return [float(np.mean([mask.mean() for mask in zeros(model, layer, MLP).values()])) for layer in range(LAYERS)]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("method", ["neuronrank_wanda", "magnitude"])
@pytest.mark.parametrize(("allocate", "without"), [("neuronrank", "uniform"), ("both", "modules")])
def test_as_many_weights_go_as_in_equal_layers(allocate: str, without: str, method: str, ratio: float) -> None:
    equal, own = (share(how, 0.1, method=method, sparsity_ratio=ratio) for how in (without, allocate))
    assert np.ptp(equal) == 0
    assert np.ptp(own) > 0.01
    missing = (sum(equal) - sum(own)) * 3 * 32 * 64  # Of the weights of three modules.
    # With `both`, gate and up lose the same number, so that there may be one too few.
    assert round(missing, 3) in ((0, 1) if allocate == "both" else (0,))


def test_both_is_the_ratios_of_layers_and_those_of_modules() -> None:
    model = small(layers=LAYERS)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.1)
    pruned(model, recipe(allocate="both", sparsity_ratio=0.4))
    for layer, ratio in enumerate(share("neuronrank", 0.1, sparsity_ratio=0.4)):
        found = {role: mask.mean() for role, mask in zeros(model, layer, MLP).items()}
        assert found == pytest.approx(
            {"gate_proj": 1.06 * ratio, "up_proj": 1.06 * ratio, "down_proj": 0.88 * ratio}, abs=0.02
        )


def test_a_layer_that_adds_little_gives_up_more() -> None:
    faint, loud = (share("neuronrank", scale) for scale in (0.01, 100.0))
    assert faint[1] > 0.55
    assert faint[1] == max(faint)
    assert loud[1] < 0.45
    assert loud[1] == min(loud)


def test_layers_that_are_not_pruned_have_no_say() -> None:
    first, *others = share("neuronrank", 0.01, pruning_last=2)
    assert first == 0
    assert sum(others) == pytest.approx(1.0, abs=1e-9)
    assert others[0] > others[1]


def test_one_huge_token_does_not_change_the_typical_norm() -> None:
    hidden = torch.ones(2, 5, 4)
    hidden[0, 0] *= 1e6
    assert typical_square_norm(residual_norm(hidden)) == pytest.approx(4.0)
