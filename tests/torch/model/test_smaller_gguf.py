"""A model without some neurons, heads or layers, written as GGUF, is read back as it was."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from pruning import pruned, recipe, same_state, state
from tiny import tiny_model
from tiny_files import logits, write_gguf

from neuronrank_torch.model.open import load_model, open_model
from neuronrank_torch.model.weights import LoadedWeights

QUANTISE = Path(__file__).parents[3] / "examples/runtimes/quantise.py"
SHAPES = {
    "neurons": ("intermediate_size", 30),
    "query-heads": ("num_attention_heads", 2),
    "key-value-groups": ("num_key_value_heads", 1),
    "layers": ("num_hidden_layers", 2),
    "layers-by-influence": ("num_hidden_layers", 2),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_it_is_read_back(kind: str, tmp_path: Path) -> None:
    model: Any = tiny_model(layers=4, hidden=48, intermediate=60)
    pruned(model, recipe(sparsity_type=kind, sparsity_ratio=0.5, update="least-squares", nsamples=10))
    file = str(write_gguf(tmp_path / "smaller.gguf", model))
    whole, _, _ = load_model(file)
    name, left = SHAPES[kind]
    assert (getattr(whole.config, name), whole.config.head_dim) == (left, 12)
    assert same_state(state(whole), state(model))
    torch.testing.assert_close(logits(whole), logits(model))
    lazy, _, _ = open_model(file)
    assert not isinstance(lazy.source, LoadedWeights)
    assert same_state({name: lazy.source.tensor(name) for name in state(model)}, state(model))


def test_quantised_zeros_stay_and_other_weights_are_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model(layers=2, hidden=32, intermediate=96)
    pruned(model, recipe(sparsity_type="neurons", sparsity_ratio=0.34))
    pruned(model, recipe(sparsity_ratio=0.5))
    source, target = write_gguf(tmp_path / "smaller.gguf", model), tmp_path / "quantised.gguf"
    monkeypatch.setattr(sys, "argv", ["quantise.py", str(source), str(target)])
    runpy.run_path(str(QUANTISE))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}
    assert (kinds["blk.1.ffn_down.weight"], kinds["token_embd.weight"]) == ("Q4_0", "Q8_0")
    again = load_model(str(target))[0]
    dense = state(model)
    assert sum(int((weight == 0).sum()) for weight in dense.values()) > 5000
    for name, weight in state(again).items():
        if weight.ndim == 1:
            assert torch.equal(weight, dense[name])
            continue
        assert not weight[dense[name] == 0].any(), name
        largest = dense[name].view(-1, 32).abs().amax(1, keepdim=True)
        # A step is an eighth of the largest of 32 weights, or a 127th in the embeddings; its scale is in float16.
        step = largest / (127 if "embed" in name else 8)
        assert ((weight - dense[name]).view(-1, 32).abs() <= 1.01 * step).all(), name
