"""Neurons removed for good: the same function as zeroing them, in an ordinary smaller model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from pruning import TEXT, linears, pruned, recipe, small
from tiny import tiny_tokenizer
from tiny_files import write_gguf
from torch import nn
from transformers import AutoModelForCausalLM

from neuronrank_torch.model.open import load_model

NEURONS = {"sparsity_type": "neurons", "sparsity_ratio": 0.25}
TOKENS = torch.arange(2, 66).view(2, 32)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def zero_missing_neurons(dense: nn.Module, smaller: nn.Module) -> None:
    """Zero every neuron of the dense model whose gate row the smaller one no longer has."""
    for layer in range(len(dense.model.layers)):
        big, left = linears(dense, layer), linears(smaller, layer)
        rows = {tuple(row) for row in left["gate_proj"].weight.tolist()}
        gone = [j for j, row in enumerate(big["gate_proj"].weight.tolist()) if tuple(row) not in rows]
        assert len(gone) == len(big["gate_proj"].weight) - len(left["gate_proj"].weight)
        with torch.no_grad():
            big["gate_proj"].weight[gone] = 0
            big["up_proj"].weight[gone] = 0
            big["down_proj"].weight[:, gone] = 0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_logits_equal_those_of_the_zero_masked_model(family: str) -> None:
    dense = small(family)  # type: ignore[arg-type]
    model = copy.deepcopy(dense)
    report = pruned(model, recipe(**NEURONS))
    assert model.config.intermediate_size == 48
    assert report.total.zeros == 0
    assert all(module.removed == module.size // 4 for layer in report.layers for module in layer.modules.values())
    zero_missing_neurons(dense, model)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("update", ["none", "least-squares"])
def test_saved_model_loads_as_a_plain_smaller_one(tmp_path: Path, update: str) -> None:
    model = small()
    before = sum(p.numel() for p in model.parameters())
    pruned(model, recipe(**NEURONS, update=update))
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.intermediate_size == 48
    assert sum(p.numel() for p in loaded.parameters()) == before - 2 * 3 * 16 * 32
    torch.testing.assert_close(logits(loaded), logits(model))


def test_converts_to_gguf(tmp_path: Path) -> None:
    model = small(tied=False)
    pruned(model, recipe(**NEURONS, update="least-squares"))
    loaded, _, _ = load_model(str(write_gguf(tmp_path / "out.gguf", model)))
    assert loaded.config.intermediate_size == 48
    torch.testing.assert_close(logits(loaded), logits(model))


def test_update_changes_down_alone_and_brings_the_first_layer_closer() -> None:
    dense = small(layers=1)
    plain, updated = copy.deepcopy(dense), copy.deepcopy(dense)
    pruned(plain, recipe(**NEURONS, nsamples=32))
    pruned(updated, recipe(**NEURONS, nsamples=32, update="least-squares"))
    assert torch.equal(linears(plain, 0)["gate_proj"].weight, linears(updated, 0)["gate_proj"].weight)
    assert not torch.equal(linears(plain, 0)["down_proj"].weight, linears(updated, 0)["down_proj"].weight)
    tokens = torch.tensor([tiny_tokenizer()(TEXT[:512]).input_ids[:256]]).view(8, 32)
    with torch.no_grad():
        reference, a, b = (model.model(tokens).last_hidden_state for model in (dense, plain, updated))
    assert (b - reference).norm() < (a - reference).norm()


def test_model_can_be_trained_afterwards() -> None:
    model = small()
    pruned(model, recipe(**NEURONS, update="least-squares"))
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in linears(model, 0)["down_proj"].parameters())
