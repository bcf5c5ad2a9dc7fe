"""Neurons removed for good: the same function as zeroing them, in an ordinary smaller model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pruning import TEXT, linears, pruned, recipe, same_state, seen, small, state
from tiny import VOCAB, tiny_tokenizer
from tiny_files import write_gguf
from torch import nn
from transformers import ApertusConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from neuronrank_core import InputError
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
    # The neurons may be others: they are chosen a few at a time.
    for role in ("gate_proj", "up_proj"):
        own = {tuple(row.tolist()) for row in linears(dense, 0)[role].weight}
        assert {tuple(row.tolist()) for row in linears(updated, 0)[role].weight} <= own
    columns = {tuple(column.tolist()) for column in linears(dense, 0)["down_proj"].weight.T}
    assert not columns & {tuple(column.tolist()) for column in linears(updated, 0)["down_proj"].weight.T}
    tokens = torch.tensor([tiny_tokenizer()(TEXT[:512]).input_ids[:256]]).view(8, 32)
    with torch.no_grad():
        reference, a, b = (model.model(tokens).last_hidden_state for model in (dense, plain, updated))
    assert (b - reference).norm() < (a - reference).norm()


def test_model_can_be_trained_afterwards() -> None:
    model = small()
    pruned(model, recipe(**NEURONS, update="least-squares"))
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in linears(model, 0)["down_proj"].parameters())


class Adapted(LlamaForCausalLM):
    """A module outside the layers has a size that follows that of the MLPs, as in Idefics 2."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.adapter = nn.Linear(3, config.intermediate_size, bias=False)


def adapted() -> nn.Module:
    return Adapted(small().config)


def apart() -> nn.Module:
    """The part with the layers has a configuration of its own, which is not saved."""
    model = small()
    model.model.config = copy.deepcopy(model.config)
    return model


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (adapted, "adapter.weight"),
        (apart, "model.layers.0.mlp.down_proj.weight"),
        (lambda: small("bitnet", layers=1), "model.layers.0.mlp.ffn_sub_norm.weight"),
    ],
    ids=["outside", "configuration", "norm"],
)
def test_a_model_that_would_not_load_is_refused_unchanged(build: Callable[[], nn.Module], name: str) -> None:
    model = build()
    before, config = state(model), model.config.to_dict()
    with pytest.raises(InputError, match=f"with fewer neurons, `{name}` of {type(model).__name__} would not have"):
        pruned(model, recipe(**NEURONS))
    assert same_state(before, state(model))
    assert model.config.to_dict() == config


def test_a_width_that_the_class_refuses_is_an_error() -> None:
    model = small()

    class Even(type(model)):
        def __init__(self, config: LlamaConfig) -> None:
            raise ValueError(f"{config.intermediate_size} is odd")

    model.__class__ = Even
    with pytest.raises(InputError, match=r"^Even cannot have 48 neurons in a layer: 48 is odd$"):
        pruned(model, recipe(**NEURONS))
    assert model.config.intermediate_size == 64


def test_a_model_that_has_been_saved_can_be_pruned(tmp_path: Path) -> None:
    # Saving turns the dtype of the configuration into a string, of which this activation makes tensors.
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    ids = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(ApertusConfig(**shape, **ids, num_key_value_heads=2, hidden_act="xielu"))
    model.save_pretrained(tmp_path)
    pruned(model, recipe(**NEURONS))
    assert model.model.layers[1].mlp.down_proj.weight.shape == (32, 48)


def test_biases_of_gate_and_up_go_with_the_neurons(tmp_path: Path) -> None:
    model = small("granite")
    pruned(model, recipe(**NEURONS))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@torch.no_grad()
@pytest.mark.parametrize("update", ["none", "least-squares"])
def test_with_dense_propagation_the_next_layer_gets_what_the_dense_one_puts_out(update: str) -> None:
    model, chosen = small(), recipe(sparsity_type="neurons", update=update, propagate="dense")
    [expected] = [out.clone() for _, out in seen(model, [model.model.layers[0]], chosen)]
    found: list[torch.Tensor] = []
    pruned(model, chosen, after=lambda run: found.append(run.hidden.clone()))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
