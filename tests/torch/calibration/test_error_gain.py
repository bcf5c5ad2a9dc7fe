"""How errors of an MLP's output reach the layer's output: against formulas of the families, and as a law."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pruning import MLP, TEXT, pruned, random_model, recipe, small, zeros
from tiny import tiny_tokenizer
from torch import Tensor, nn
from transformers import Qwen2MoeConfig

from neuronrank_torch.calibration import error_gain
from neuronrank_torch.calibration.error_gain import error_gains
from neuronrank_torch.calibration.layerwise import LayerRun, run_layers
from neuronrank_torch.distributed.ranks import ALONE
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.text.sequences import calibration_sequences

SEQUENCES = calibration_sequences(tiny_tokenizer(), recipe(), TEXT)


@torch.no_grad()
def gains(model: nn.Module, first: int = 0) -> list[np.ndarray]:
    """Of each layer, shape (documents, mlps)."""
    found = []

    def visit(run: LayerRun) -> None:
        found.append(error_gains(run, run.layer.mlps, ALONE, first))
        run.feed(keep=True)

    run_layers(find_decoder(model), SEQUENCES, visit)
    return found


@torch.no_grad()
def outputs_of(module: nn.Module, model: nn.Module) -> Tensor:
    """What a module puts out for the first document, shape (tokens, features)."""
    seen: list[Tensor] = []
    with module.register_forward_hook(lambda module, args, out: seen.append(out.flatten(0, -2))):
        model(SEQUENCES[:1])
    return seen[0]


@pytest.mark.parametrize("family", ["llama", "mixtral", "bitnet"])
def test_what_is_added_as_it_is_has_a_gain_of_exactly_one(family: Any) -> None:
    assert all((found[0] == 1).all() for found in gains(small(family)))


def test_a_factor_of_the_residual_counts_squared() -> None:
    assert all(found[0] == pytest.approx(0.7**2, rel=0.03) for found in gains(small("granite")))


def test_a_norm_divides_by_the_size_of_its_input() -> None:
    model = small("gemma3")
    for layer, found in zip(model.model.layers, gains(model), strict=True):
        output = outputs_of(layer.mlp.down_proj, model)
        gain = 1 + layer.post_feedforward_layernorm.weight.detach()
        expected = output.shape[1] * gain.square().mean() / output.square().sum(1).mean()
        assert found[0, 0] == pytest.approx(float(expected), rel=0.1)


def test_a_shared_expert_counts_by_its_own_gate_and_the_routed_ones_as_they_are() -> None:
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 300}
    experts = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = random_model(Qwen2MoeConfig(**common, **experts, **heads))
    [found] = gains(model)
    mlp = model.model.layers[0].mlp
    gate = outputs_of(mlp.shared_expert_gate, model).sigmoid().square()
    squares = outputs_of(mlp.shared_expert.down_proj, model).square().sum(1, keepdim=True)
    assert found[0] == pytest.approx([1, 1, 1, 1, float((gate * squares).sum() / squares.sum())], rel=0.1)


def test_one_document_of_many_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_gain, "EVERY", 3)
    found = gains(small("gemma3"), first=2)[0][:, 0]
    assert np.isfinite(found).tolist() == [(2 + document) % 3 == 0 for document in range(len(SEQUENCES))]


def shares(model: nn.Module) -> list[float]:
    pruned(model, recipe(allocate="neuronrank"))
    return [float(np.mean([mask.mean() for mask in zeros(model, layer, MLP).values()])) for layer in range(3)]


def test_what_a_norm_undoes_does_not_change_the_ratios() -> None:
    plain, scaled = (small("gemma3", layers=3) for _ in range(2))
    with torch.no_grad():
        scaled.model.layers[1].mlp.down_proj.weight.mul_(32)
    assert shares(scaled) == pytest.approx(shares(plain), abs=2e-3)


def test_a_factor_in_the_weights_and_one_after_them_give_the_same_ratios() -> None:
    after, inside = (small("granite", layers=3) for _ in range(2))
    after.model.layers[1].residual_multiplier, inside.model.layers[1].residual_multiplier = 0.1, 1.0
    with torch.no_grad():
        layer = inside.model.layers[1]
        for parameter in [*layer.mlp.down_proj.parameters(), *layer.self_attn.o_proj.parameters()]:
            parameter.mul_(0.1)
    first, second = shares(after), shares(inside)
    assert first[1] > first[0] + 0.05
    assert first == pytest.approx(second, abs=5e-3)
