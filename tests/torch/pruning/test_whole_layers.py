"""Layers removed for good: the same function as skipping them, in an ordinary shallower model."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import TEXT, pruned, recipe, same_state, small, state
from tiny import tiny_config, tiny_model, tiny_tokenizer
from tiny_types import tiny_type
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from neuronrank_core import InputError, InvalidValueError, Recipe
from neuronrank_torch import prune
from neuronrank_torch.model.depth import shallower
from neuronrank_torch.text.sequences import calibration_sequences

TOKENS = torch.arange(2, 66).view(2, 32)
HALF: dict[str, Any] = {"sparsity_type": "layers", "sparsity_ratio": 0.5, "nsamples": 10}
FAMILIES = ("llama", "mistral", "qwen3", "gemma3", "granite", "qwen3_moe")


def logits(model: nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def skipping(model: nn.Module, gone: Sequence[int]) -> nn.Module:
    """A copy in which layers return what they get."""
    other = copy.deepcopy(model)
    for index in gone:
        other.model.layers[index].forward = lambda hidden, *args, **kwargs: hidden
    return other


def order_of(notes: Sequence[str]) -> tuple[list[int], list[float]]:
    """The removed layers in order, and their divergences, as the result says."""
    [note] = [note for note in notes if note.startswith("layers removed, in this order")]
    found = re.findall(r"(\d+) \(([\d.e-]+)\)", note)
    return [int(index) for index, _ in found], [float(cost) for _, cost in found]


def model_of(family: str, layers: int = 4) -> nn.Module:
    return small(family, layers=layers)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["layers", "layers-by-influence"])
def test_logits_equal_those_of_skipped_layers(family: str, kind: str, tmp_path: Path) -> None:
    dense = model_of(family)
    with torch.no_grad():  # So that it is not the last layers that go.
        dense.model.layers[0].self_attn.o_proj.weight.mul_(0.01)
        dense.model.layers[2].self_attn.o_proj.weight.mul_(0.01)
    model = copy.deepcopy(dense)
    report = pruned(model, recipe(**{**HALF, "sparsity_type": kind}))
    gone, _ = order_of(report.notes)
    assert len(gone) == 2
    assert model.config.num_hidden_layers == 2 == len(model.model.layers)
    kept = [index for index in range(4) if index not in gone]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    types = getattr(dense.config, "layer_types", None)
    if types:
        assert model.config.layer_types == [types[index] for index in kept]
    torch.testing.assert_close(logits(model), logits(skipping(dense, gone)), rtol=1e-5, atol=1e-6)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in dense.model.layers]
    assert report.total.removed == sum(sizes[index] for index in gone)
    assert [layer.sum("removed") for layer in report.layers] == [sizes[i] * (i in gone) for i in range(4)]

    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    torch.testing.assert_close(logits(loaded), logits(model))
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(TOKENS[:1], **how), loaded.generate(TOKENS[:1], use_cache=False, **how))


def test_each_step_removes_what_changes_held_out_predictions_least() -> None:
    dense = tiny_model(layers=5, hidden=32, intermediate=64, seed=3)
    with torch.no_grad():  # Different costs, in no order.
        for layer, factor in zip(dense.model.layers, (0.9, 0.3, 1.5, 0.2, 0.6), strict=True):
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
    chosen = recipe(sparsity_type="layers", sparsity_ratio=0.6, nsamples=10)
    held_out = calibration_sequences(tiny_tokenizer(), chosen, TEXT)[-2:]  # A fifth of ten

    def divergence(gone: Sequence[int]) -> float:
        p, q = (logits(m, held_out)[:, :-1].double().log_softmax(-1) for m in (dense, skipping(dense, gone)))
        return float((p.exp() * (p - q)).sum(-1).mean())

    expected: list[int] = []
    costs = []
    for _ in range(3):
        left = {i: divergence([*expected, i]) for i in range(5) if i not in expected}
        expected.append(min(left, key=lambda i: left[i]))
        costs.append(left[expected[-1]])
    found, said = order_of(pruned(copy.deepcopy(dense), chosen).notes)
    assert found == expected
    assert said == pytest.approx(costs, rel=1e-3)
    assert expected != sorted(expected, reverse=True)  # Not by position


def test_block_influence_is_one_minus_the_mean_cosine() -> None:
    dense = tiny_model(layers=4, hidden=32, intermediate=64, seed=3)
    with torch.no_grad():
        for layer, factor in zip(dense.model.layers, (0.5, 0.1, 1.0, 0.3), strict=True):
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
    chosen = recipe(**{**HALF, "sparsity_type": "layers-by-influence"})
    text = calibration_sequences(tiny_tokenizer(), chosen, TEXT)[:-2]
    states: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: states.append(args[0])) for layer in dense.model.layers
    ]
    hooks.append(dense.model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0])))
    logits(dense, text)
    for hook in hooks:
        hook.remove()
    pairs = [(x.double(), y.double()) for x, y in itertools.pairwise(states)]
    influence = [float((1 - (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).mean()) for x, y in pairs]
    lowest = sorted(range(4), key=lambda index: influence[index])[:2]
    assert lowest != sorted(lowest, reverse=True)
    assert order_of(pruned(copy.deepcopy(dense), chosen).notes)[0] == lowest


def test_update_brings_what_follows_closer_and_changes_one_matrix() -> None:
    dense = tiny_model("llama", layers=4, hidden=32, intermediate=64, seed=1)
    with torch.no_grad():  # The second layer is almost nothing but a map of its input, and goes.
        dense.model.layers[1].self_attn.o_proj.weight.mul_(0.1)
        dense.model.layers[1].mlp.down_proj.weight.mul_(0.3)
    chosen: dict[str, Any] = {"sparsity_type": "layers", "sparsity_ratio": 0.25, "nsamples": 40}
    models = {}
    for update in ("none", "least-squares"):
        models[update] = copy.deepcopy(dense)
        assert order_of(pruned(models[update], recipe(**chosen, update=update)).notes)[0] == [1]
    changed = {
        name
        for name, tensor in state(models["none"]).items()
        if not torch.equal(tensor, state(models["least-squares"])[name])
    }
    assert changed == {"model.layers.0.mlp.down_proj.weight"}
    text = calibration_sequences(tiny_tokenizer(), recipe(**chosen), TEXT)
    with torch.no_grad():
        target = dense.model(text, output_hidden_states=True).hidden_states[2]
        error = {
            update: (model.model(text, output_hidden_states=True).hidden_states[1] - target).norm()
            for update, model in models.items()
        }
    assert error["least-squares"] < 0.9 * error["none"]


@pytest.mark.parametrize("family", ["gemma3", "granite"])
def test_a_norm_or_factor_after_the_mlp_is_left_without_an_update(family: str) -> None:
    dense = model_of(family)
    plain, updated = copy.deepcopy(dense), copy.deepcopy(dense)
    pruned(plain, recipe(**HALF))
    report = pruned(updated, recipe(**HALF, update="least-squares"))
    assert same_state(state(plain), state(updated))
    assert sum("was removed without an update: layer" in note for note in report.notes) == 2


def test_a_first_layer_is_removed_without_an_update() -> None:
    dense = model_of("llama")
    with torch.no_grad():
        dense.model.layers[0].self_attn.o_proj.weight.zero_()
        dense.model.layers[0].mlp.down_proj.weight.zero_()
    report = pruned(dense, recipe(**{**HALF, "sparsity_ratio": 0.25}, update="least-squares"))
    assert "layer 0 was removed without an update: no layer is before it" in report.notes


def test_configurations_keep_the_entries_of_the_layers_that_stay() -> None:
    config = tiny_config("qwen3_moe", layers=4)
    config.mlp_only_layers, config.layer_types = [1, 3], ["a", "b", "c", "d"]
    config.eos_token_id = [1, 2, 3, 4]  # Of the same length by chance
    expected = {"num_hidden_layers": 2, "mlp_only_layers": [1], "layer_types": ["a", "d"]}
    assert shallower(config, [0, 3]) == expected


class Alternating(LlamaForCausalLM):
    """Every other layer has another setting, which the configuration does not state."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn.scaling *= 1 + index % 2


def test_layers_that_would_be_built_otherwise_stay() -> None:
    model = Alternating(small(layers=4).config).eval()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    report = pruned(model, recipe(**{**HALF, "sparsity_ratio": 0.25}))
    assert order_of(report.notes)[0] == [3]  # The second would cost nothing.


@pytest.mark.parametrize("kind", ["layers", "layers-by-influence"])
def test_a_model_that_skips_layers_on_text_is_left_as_it_was(kind: str) -> None:
    model = tiny_type("mllama").eval()
    before = state(model)
    with pytest.raises(InputError, match=r"^MllamaForCausalLM does not run layers 1 on text alone$"):
        pruned(model, recipe(**{**HALF, "sparsity_type": kind}))
    assert same_state(before, state(model))


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_a_hybrid_keeps_a_layer_of_attention_and_generates(family: str) -> None:
    model = tiny_type(family).eval()
    with torch.no_grad():  # So that the layer of attention, the last one, would go first.
        for parameter in model.model.layers[-1].parameters():
            parameter.mul_(0.01)
    pruned(model, recipe(**{**HALF, "sparsity_ratio": 0.7 if len(model.model.layers) == 3 else 0.5}))
    assert len(model.model.layers) == 1
    assert model.generate(TOKENS[:1], max_new_tokens=4, min_new_tokens=4).shape == (1, 36)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"sparsity_ratio": 0.2},
            r"sparsity_ratio is 0.2, allowed: at least 0.25 and below 1, to remove one of 4 layers",
        ),
        ({"nsamples": 1}, "at least two sequences"),
    ],
)
def test_what_cannot_be_done_leaves_the_model_as_it_was(chosen: dict[str, Any], message: str) -> None:
    model = model_of("llama")
    before = state(model)
    with pytest.raises(InputError, match=message):
        pruned(model, recipe(**{**HALF, **chosen}))
    assert same_state(before, state(model))
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize(("stage", "gone"), [("removing layer 1", 0), ("removing layer 2", 1)])
def test_a_failure_leaves_a_model_without_the_layers_that_were_removed(stage: str, gone: int) -> None:
    dense = model_of("llama", layers=6)
    chosen = {**HALF, "update": "least-squares", "sparsity_ratio": 0.34}
    model, expected = copy.deepcopy(dense), copy.deepcopy(dense)

    def fail(what: str, done: int, *_: object) -> None:
        if what.startswith(stage) and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, tiny_tokenizer(), recipe(**chosen), TEXT, progress=fail)
    if gone:
        pruned(expected, recipe(**{**chosen, "sparsity_ratio": 0.17}))
    assert len(model.model.layers) == model.config.num_hidden_layers == 6 - gone
    assert torch.equal(logits(model), logits(expected))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("call", range(1, 15))
def test_no_failing_forward_pass_leaves_a_hook_or_a_map(call: int) -> None:
    model = model_of("llama")
    before, calls = state(model), 0
    forward = model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise MemoryError
        return forward(*args, **kwargs)

    model.forward = failing
    with pytest.raises(MemoryError):
        pruned(model, recipe(**HALF, update="least-squares"))
    assert same_state(before, state(model))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("fields", [{"sparsity_ratio": 1.0}, {"update": "gradual"}, {"propagate": "dense"}])
def test_what_cannot_be_asked_of_layers(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match=next(iter(fields))):
        Recipe(sparsity_type="layers", **fields)
