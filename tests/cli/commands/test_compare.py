"""Two models side by side, against their weights as transformers loads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import LAYERS, Run
from tiny import VOCAB, tiny_model
from tiny_files import write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeConfig, GPT2Config, MixtralConfig, Phi3Config

from neuronrank_torch.evaluation import speed

MODULES = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def pair(run: Run, small: list[object]) -> list[str]:
    run("prune", *small, "--prune_method", "wanda", "--save", "a")
    run("prune", *small, "--prune_method", "magnitude", "--sparsity_ratio", 0.3, "--save", "b")
    return ["a", "b"]


def compared(run: Run, *arguments: object) -> dict[str, Any]:
    return json.loads(run("compare", *arguments, "--json").stdout)


def test_overlap_is_that_of_the_weights(run: Run, pair: list[str], tmp_path: Path) -> None:
    result = compared(run, *pair)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in pair]
    assert [layer["layer"] for layer in result["layers"]] == list(range(LAYERS))
    both, either, size, kept = 0, 0, 0, 0
    for layer in result["layers"]:
        assert sorted(layer["modules"]) == sorted(MODULES)
        for name, found in layer["modules"].items():
            mlps = (m.model.layers[layer["layer"]].mlp for m in models)
            a, b = (getattr(mlp, name).weight == 0 for mlp in mlps)
            assert found["zeros"] == [int(a.sum()), int(b.sum())]
            assert found["zeros_in_both"] == int((a & b).sum())
            assert found["jaccard"] == float((a & b).sum() / (a | b).sum().double())
            assert found["kept_in_both"] == float((~a & ~b).double().mean())
            both, either = both + int((a & b).sum()), either + int((a | b).sum())
            size, kept = size + a.numel(), kept + int((~a & ~b).sum())
    assert (result["total"]["jaccard"], result["total"]["kept_in_both"]) == (both / either, kept / size)
    for folder, loaded, model in zip(pair, models, result["models"], strict=True):
        assert model["parameters"] == sum(p.numel() for p in loaded.parameters())
        assert model["nonzero"] == sum(int((p != 0).sum()) for p in loaded.parameters())
        assert model["bytes"] == (tmp_path / folder / "model.safetensors").stat().st_size
    assert result["notes"] == []


def test_the_table_shows_the_same(run: Run, pair: list[str]) -> None:
    result, shown = compared(run, *pair), run("compare", *pair).stdout
    assert shown.startswith("A: a\nB: b\n")
    rows = re.findall(r"│ +(\w+) │ ([\d.]+) │ ([\d.]+) │ ([\d.]+) │ +([\d.]+%) │", shown)
    first = result["layers"][0]["modules"]
    assert rows[0][:4] == ("0", *(f"{first[name]['jaccard']:.3f}" for name in MODULES))
    assert rows[-1][0] == "all"
    assert rows[-1][4] == f"{result['total']['kept_in_both']:.2%}"
    assert f"{result['models'][1]['nonzero']:,}" in shown


@pytest.mark.usefixtures("pair")
def test_a_model_with_itself(run: Run) -> None:
    result = compared(run, "a", "a")
    assert result["total"]["jaccard"] == 1.0
    assert result["total"]["kept_in_both"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.usefixtures("pair")
def test_attention_is_compared_where_it_is_pruned(run: Run, small: list[object]) -> None:
    run("prune", *small, "--prune_method", "wanda", "--nr-include-attention", "--save", "c")
    first = compared(run, "a", "c")["layers"][0]["modules"]
    assert first["gate_proj"]["jaccard"] == 1.0
    assert first["q_proj"]["zeros"] == [0, 512]
    assert first["q_proj"]["jaccard"] == 0.0


COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False}
GPT2 = GPT2Config(n_embd=24, n_inner=56, n_layer=2, n_head=4, n_positions=64, **COMMON)
SHAPE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 6}
SHAPE |= {"num_key_value_heads": 2, **COMMON}
#: A configuration, and every role's matrices in a layer.
FAMILIES: dict[str, tuple[Any, Callable[[Any], dict[str, list[Tensor]]]]] = {
    "plain": (GPT2, lambda layer: {"up_proj": [layer.mlp.c_fc.weight.T], "down_proj": [layer.mlp.c_proj.weight.T]}),
    "fused": (
        Phi3Config(**SHAPE),
        lambda layer: {
            "gate_proj": [layer.mlp.gate_up_proj.weight[:40]],
            "up_proj": [layer.mlp.gate_up_proj.weight[40:]],
            "down_proj": [layer.mlp.down_proj.weight],
        },
    ),
    "experts": (
        MixtralConfig(**SHAPE, num_local_experts=3, num_experts_per_tok=2),
        lambda layer: {
            "gate_proj": list(layer.mlp.experts.gate_up_proj[:, :40]),
            "up_proj": list(layer.mlp.experts.gate_up_proj[:, 40:]),
            "down_proj": list(layer.mlp.experts.down_proj),
            "k_proj": [layer.self_attn.k_proj.weight],
        },
    ),
}


def zeroed(folder: Path, family: str, seed: int) -> tuple[str, list[dict[str, Tensor]], Tensor]:
    """A saved model with zeros of other shares in every role, and where they are by layer, and in the head."""
    config, roles = FAMILIES[family]
    model: Any = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    masks: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for layer in model.transformer.h if family == "plain" else model.model.layers:
            masks.append({})
            for number, (role, weights) in enumerate(roles(layer).items(), 2):
                zero = [torch.rand(weight.shape, generator=generator) < number / 10 for weight in weights]
                for weight, where in zip(weights, zero, strict=True):
                    weight.normal_(generator=generator).masked_fill_(where, 0)
                masks[-1][role] = torch.stack(zero)
        head = torch.rand(model.lm_head.weight.shape, generator=generator) < 0.5
        model.lm_head.weight.normal_(generator=generator).masked_fill_(head, 0)
    write_model(folder, model, bos=False)
    return str(folder), masks, head


@pytest.mark.parametrize("family", FAMILIES)
def test_overlap_is_by_role_in_every_family(run: Run, tmp_path: Path, family: str) -> None:
    (a, masks_a, head_a), (b, masks_b, head_b) = (zeroed(tmp_path / name, family, i) for i, name in enumerate("ab"))
    result = compared(run, a, b)
    assert result["notes"] == []
    assert [layer["layer"] for layer in result["layers"]] == [0, 1, "lm_head"]
    expected = [*zip(masks_a, masks_b, strict=True), ({"lm_head": head_a}, {"lm_head": head_b})]
    for layer, (zero_a, zero_b) in zip(result["layers"], expected, strict=True):
        assert layer["modules"].keys() == zero_a.keys()
        for role, found in layer["modules"].items():
            assert found["size"] == zero_a[role].numel()
            assert found["zeros"] == [int(zero_a[role].sum()), int(zero_b[role].sum())]
            assert found["zeros_in_both"] == int((zero_a[role] & zero_b[role]).sum())
    for folder, figures in zip((a, b), result["models"], strict=True):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert figures["nonzero"] == sum(int((p != 0).sum()) for p in loaded.parameters())
    assert "│ lm_head │" in run("compare", a, b).stdout


def test_what_only_one_of_the_models_has_is_noted(run: Run, tmp_path: Path) -> None:
    (a, *_), (b, *_) = (zeroed(tmp_path / family, family, 0) for family in ("fused", "experts"))
    names = "down_proj, experts.0.down_proj, experts.0.gate_proj, experts.0.up_proj and 12 more"
    result = compared(run, a, b)
    assert result["notes"] == [f"not compared because only one of the models has them: {names}"]
    assert [layer["layer"] for layer in result["layers"]] == ["lm_head"]


def test_other_shapes_are_compared_by_size_alone(run: Run, small: list[object], model: Path) -> None:
    run("prune", *small, "--sparsity_type", "neurons", "--sparsity_ratio", 0.25, "--save", "smaller")
    result = run("compare", model, "smaller", "--json")
    assert "Warning: not compared because their shapes differ: down_proj, gate_proj, up_proj" in result.stderr
    data = json.loads(result.stdout)
    assert data["layers"] == []
    assert data["total"] is None
    dense, smaller = (figures["parameters"] for figures in data["models"])
    assert dense - smaller == LAYERS * 3 * 16 * 32
    assert "both keep" not in run("compare", model, "smaller").stdout


def test_other_depths_are_compared_by_size_alone(run: Run, model: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "flat", tiny_model(layers=2, hidden=32, intermediate=64), bos=False)
    result = run("compare", model, "flat", "--json")
    assert f"the models have {LAYERS} and 2 layers" in result.stderr
    data = json.loads(result.stdout)
    assert data["layers"] == []
    assert data["models"][1]["nonzero"] == data["models"][1]["parameters"]


def test_perplexity_and_speed(run: Run, pair: list[str], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 2)
    how = ["--seqlen", 32, "--batch-size", 2]
    timed = ["--eval", "--eval-dataset", text, "--eval-windows", 2, "--speed", *how]
    result = run("compare", *pair, *timed, "--json")
    for figures in json.loads(result.stdout)["models"]:
        alone = run("eval", "--model", figures["model"], "--dataset", text, "--windows", 2, *how, "--json")
        measured = json.loads(alone.stdout)
        assert figures["perplexity"] == {name: measured[name] for name in figures["perplexity"]}
        for task in ("prefill", "decode"):
            rates = figures["speed"][task]
            assert 0 < rates["lower"] <= rates["median"] <= rates["upper"]
    shown = run("compare", *pair, *timed).stdout
    assert re.search(r"writing \(decode\), tokens/s[ │]+[\d,]+ \([\d,]+ to [\d,]+\)[ │]+[\d,]+ \(", shown)
    claims = re.findall(r"(\w+) \(\w+\): (no difference beyond the spread: )?B is [\d.]+ times as fast as A \(", shown)
    assert [task for task, _ in claims] == ["reading", "writing"]
    assert re.search(r"perplexity[ │]+[\d.]+[ │]+[\d.]+", shown)
    assert "2 windows of 32 tokens" in shown


def test_flags_without_effect_and_a_missing_model(run: Run, model: Path) -> None:
    stderr = run("compare", model, model, "--eval-windows", 3, "--seqlen", 16).stderr
    assert "--eval-windows has no effect without --eval" in stderr
    assert "--seqlen has no effect without --eval or --speed" in stderr
    assert "model not found" in run("compare", model, "./nowhere", code=2).stderr


def test_experts_that_were_numbered_anew_are_not_compared(run: Run, tmp_path: Path) -> None:
    a, *_ = zeroed(tmp_path / "mixture", "experts", 0)
    smaller = MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=2)
    b = write_model(tmp_path / "smaller", AutoModelForCausalLM.from_config(smaller), bos=False)
    result = compared(run, a, b)
    listed = ", ".join(f"the experts of layer {layer}" for layer in range(SHAPE["num_hidden_layers"]))
    assert result["notes"] == [f"not compared because their numbers of experts differ: {listed}"]
    assert all("gate_proj" not in layer["modules"] for layer in result["layers"])


def test_buffers_are_no_parameters(run: Run, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "first_k_dense_replace": 1}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
    config = Glm4MoeConfig(**sizes, **heads, **experts, topk_group=1, max_position_embeddings=128)
    made: Any = AutoModelForCausalLM.from_config(config)
    made.model.layers[1].mlp.gate.e_score_correction_bias.fill_(1)
    folder = write_model(tmp_path / "glm", made)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for figures in compared(run, folder, folder)["models"]:
        assert figures["nonzero"] == sum(int((p != 0).sum()) for p in loaded.parameters()) <= figures["parameters"]


def test_two_protocols_are_both_shown(run: Run, tmp_path: Path, text: Path) -> None:
    a, b = (
        write_model(tmp_path / name, tiny_model(layers=2, hidden=32, intermediate=64), bos=bos)
        for name, bos in (("plain", False), ("bos", True))
    )
    how = ["--eval", "--eval-dataset", text, "--eval-windows", 2, "--seqlen", 32]
    shown = run("compare", a, b, *how).stdout
    assert re.search(r"perplexity of A measured on: .* no BOS\n", shown)
    assert re.search(r"perplexity of B measured on: .* BOS at every window; not comparable", shown)
