"""Experts removed for good: the same function as a router that never chooses them, in an ordinary smaller model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from experts import FAMILIES
from pruning import TEXT, pruned, random_model, recipe, same_state, small, state
from tiny import tiny_tokenizer
from tiny_types import tiny_type
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from neuronrank_core import InputError, InvalidValueError
from neuronrank_core.effort import passes_by_effort
from neuronrank_core.methods import ALL_METHODS
from neuronrank_torch.model.open import load_model
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.model.weights import SafetensorsWeights
from neuronrank_torch.pruning.scope import planned_layers
from neuronrank_torch.pruning.sparsity_types import sparsity_type_of
from neuronrank_torch.runs.dry_run import plan_prune
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.prune import run_prune

TOKENS = torch.arange(2, 98).view(2, 48)
every_family = pytest.mark.parametrize("family", FAMILIES)
METHODS = [name for name, method in ALL_METHODS.items() if method.ranks_experts]
DEAD = float("-inf")


def dense_model(family: str) -> nn.Module:
    return random_model(copy.deepcopy(FAMILIES[family][0]))


def chosen(**options: Any) -> Any:
    return recipe(**{"sparsity_type": "experts", "sparsity_ratio": 0.4, "method": "reap", **options})


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def moe(model: nn.Module) -> dict[int, Any]:
    """The block of every layer that has experts, by the number of the layer."""
    return {i: layer.mlp for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}


def router_of(block: Any) -> Any:
    return getattr(block, "router", None) or block.gate


def removed(dense: nn.Module, smaller: nn.Module) -> dict[int, list[int]]:
    """By layer, the experts whose matrices the smaller model no longer has."""
    there = {layer: list(block.experts.down_proj) for layer, block in moe(smaller).items()}
    return {
        layer: [
            e for e, own in enumerate(block.experts.down_proj) if not any(torch.equal(own, o) for o in there[layer])
        ]
        for layer, block in moe(dense).items()
    }


@contextmanager
def never_chosen(model: nn.Module, experts: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every router's logits of these experts are minus infinity, and its corrected scores too."""
    routers = {id(router_of(block).weight): experts[layer] for layer, block in moe(model).items()}
    linear = nn.functional.linear

    def masked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        if id(weight) in routers:
            out[..., routers[id(weight)]] = DEAD
        return out

    for layer, block in moe(model).items():
        if (bias := getattr(router_of(block), "e_score_correction_bias", None)) is not None:
            bias[experts[layer]] = DEAD
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", masked)
        yield


@every_family
def test_logits_equal_those_of_a_router_that_never_chooses_them(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, name = dense_model(family), FAMILIES[family][1]
    model = copy.deepcopy(dense)
    report = pruned(model, chosen())
    experts = removed(dense, model)
    before = getattr(dense.config, name)
    goes = 2 * int(0.4 * (before // 2)) if family == "deepseek" else int(0.4 * before)
    assert all(len(gone) == goes for gone in experts.values())
    assert len({tuple(gone) for gone in experts.values()}) > 1, "each layer chooses its own"
    assert {layer.layer: list(layer.experts_removed) for layer in report.layers} == experts
    assert getattr(model.config, name) == before - goes
    whole = logits(dense)
    with never_chosen(dense, experts, monkeypatch):
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), whole, atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_state(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits(loaded), logits(model))


def by_module(layers: Any) -> dict[int, dict[str, int]]:
    return {layer.layer: {role: module.removed for role, module in layer.modules.items()} for layer in layers}


@every_family
def test_planned_is_what_is_removed(family: str) -> None:
    model = dense_model(family)
    layers, _ = planned_layers(model, chosen())
    before = sum(p.numel() for p in model.parameters())
    kind = sparsity_type_of(chosen())
    blocks = [block for layer in find_decoder(model).layers for block in kind.blocks(layer, chosen())]
    shrinks = sum(kind.shrinkage(block, chosen()) for block in blocks)
    report = pruned(model, chosen())
    assert by_module(layers) == by_module(report.layers)
    hidden = model.config.hidden_size
    of_router = sum((hidden + (family == "gpt_oss")) * len(layer.experts_removed) for layer in report.layers)
    of_experts = report.total.removed
    if family == "gpt_oss":  # Biases of gate, up and down.
        of_experts += sum((2 * 20 + hidden) * len(layer.experts_removed) for layer in report.layers)
    assert before - sum(p.numel() for p in model.parameters()) == of_experts + of_router == shrinks


@pytest.mark.parametrize("method", METHODS)
def test_every_method_removes_experts(method: str) -> None:
    dense = dense_model("mixtral")
    first, again = copy.deepcopy(dense), copy.deepcopy(dense)
    pruned(first, chosen(method=method))
    pruned(again, chosen(method=method))
    assert all(len(gone) == 2 for gone in removed(dense, first).values())
    assert same_state(state(first), state(again))


def test_the_seed_decides_what_random_removes() -> None:
    dense, found = dense_model("olmoe"), []
    for seed in range(4):
        model = copy.deepcopy(dense)
        pruned(model, chosen(method="random", seed=seed))
        found.append(str(removed(dense, model)))
    assert len(set(found)) == 4


@every_family
@pytest.mark.parametrize("stored", ["as published", "as in memory"])
def test_from_disk_to_disk(family: str, stored: str, tmp_path: Path) -> None:
    """An interrupted and resumed run saves what the run in memory makes, under the names of the source."""
    source, text = tmp_path / "source", tmp_path / "text.txt"
    dense_model(family).save_pretrained(source, save_original_format=stored == "as published")
    tiny_tokenizer().save_pretrained(source)
    text.write_text(TEXT)
    model, _, _ = load_model(str(source))
    expected = pruned(model, chosen())
    job = Job(str(source), str(text), save=str(tmp_path / "out"))

    def cut(stage: str, *_: int) -> None:
        if stage.startswith("calibrating layer 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_prune(job, chosen(), cut)
    stages: list[str] = []
    result = run_prune(job, chosen(), lambda stage, *_: stages.append(stage))
    assert any(stage.startswith("resuming: 2 of 3") for stage in stages)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_state(loaded.state_dict(), model.state_dict())
    assert [layer.experts_removed for layer in result.layers] == [layer.experts_removed for layer in expected.layers]
    saved, left = tmp_path / "out", tmp_path / "left"
    model.save_pretrained(left, save_original_format=stored == "as published")
    assert names(saved) == names(left)


def test_a_plan_may_estimate_several_efforts(tmp_path: Path) -> None:
    dense_model("qwen3_moe").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    efforts = passes_by_effort(chosen())
    result = plan_prune(Job(str(tmp_path / "model"), str(tmp_path / "text.txt")), chosen(), efforts)
    assert result.plan is not None
    assert result.plan.efforts.keys() == efforts.keys()
    assert result.total.removed == pruned(dense_model("qwen3_moe"), chosen()).total.removed
    assert any("layers without experts are not pruned: 1" in note for note in result.notes)


def test_a_model_without_experts_is_refused() -> None:
    model = small("llama")
    with pytest.raises(InputError, match="--sparsity_type experts needs a mixture of experts, and LlamaModel is none"):
        pruned(model, chosen())


def test_a_tensor_that_grows_otherwise_with_the_experts_is_refused() -> None:
    """Zaya's router has one entry more than there are experts."""
    model = tiny_type("zaya")
    before = state(model)
    with pytest.raises(
        InputError, match=r"with fewer experts, `\S*balancing_biases` of ZayaForCausalLM would not have"
    ):
        pruned(model, chosen(sparsity_ratio=0.25))
    assert same_state(before, state(model))


def names(folder: Path) -> set[str]:
    return set(SafetensorsWeights(folder.glob("*.safetensors")).shapes())


def refused(config: Any, **options: Any) -> InputError:
    model = random_model(config)
    before, stated = state(model), model.config.to_dict()
    with pytest.raises(InputError) as caught:
        pruned(model, chosen(**options))
    assert same_state(before, state(model))
    assert model.config.to_dict() == stated
    return caught.value


def test_as_many_experts_as_a_token_needs_stay() -> None:
    error = refused(copy.deepcopy(FAMILIES["mixtral"][0]), sparsity_ratio=0.8)
    assert isinstance(error, InvalidValueError)
    assert error.field == "sparsity_ratio"
    assert str(error.allowed) == "one that keeps 2 of 5 experts: the router chooses 2 for a token"
    error = refused(copy.deepcopy(FAMILIES["deepseek"][0]), sparsity_ratio=0.75)
    assert "one that keeps 2 of 4 experts of each group" in str(error)


def test_a_ratio_that_removes_nothing_is_refused() -> None:
    assert "at least 0.2 and below 1, to remove one of 5 experts" in str(
        refused(copy.deepcopy(FAMILIES["mixtral"][0]), sparsity_ratio=0.1)
    )
