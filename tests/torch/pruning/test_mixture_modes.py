"""Every mode of pruning on every layout of a mixture: exact counts or widths, and the same logits when loaded again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from experts import FAMILIES, SIZES
from pruning import TEXT, pruned, random_model, recipe, same_state, state
from tiny import tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Llama4TextConfig

from neuronrank_core import InputError
from neuronrank_core.effort import effort_settings
from neuronrank_torch.model.open import load_model
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.prune import run_prune

NAMES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss")
TOKENS = torch.arange(2, 50).view(2, 24)
#: Widths are 20, 12 or, of a shared expert, 6: 12, 8 and 4 stay.
NEURONS = {"sparsity_type": "neurons", "sparsity_ratio": 0.4, "multiple_of": 4}
MODES: dict[str, dict[str, Any]] = {
    "least-squares": {"update": "least-squares"},
    "gradual": {"update": "gradual"},
    "least-squares with attention": {"update": "least-squares", "include_attention": True},
    "N:M, least-squares": {"sparsity_type": "1:2", "update": "least-squares"},
    "allocate modules": {"allocate": "modules", "update": "least-squares"},
    "allocate neuronrank": {"allocate": "neuronrank"},
    "allocate both": {"allocate": "both", "update": "least-squares"},
    "neurons by magnitude": {**NEURONS, "method": "magnitude"},
    "neurons, least-squares": {**NEURONS, "update": "least-squares"},
    "neurons, dense propagation": {**NEURONS, "update": "least-squares", "propagate": "dense"},
    "heads": {"sparsity_type": "heads", "update": "least-squares"},
    "experts": {"sparsity_type": "experts", "sparsity_ratio": 0.25},
    "layers": {"sparsity_type": "layers", "update": "least-squares"},
}
every_family = pytest.mark.parametrize("family", NAMES)


def dense_model(family: str) -> nn.Module:
    """Two layers; in Qwen3-MoE, the second one has an ordinary MLP."""
    config = copy.deepcopy(FAMILIES[family][0])
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return random_model(config)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def mlp_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Matrices of routed, shared and ordinary MLPs."""
    parts = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
    named = model.named_parameters()
    return {n: p for n, p in named if n.removesuffix(".weight").split(".")[-1] in parts and ".mlp." in n}


@every_family
@pytest.mark.parametrize("mode", MODES)
def test_mode(family: str, mode: str, tmp_path: Path) -> None:
    dense, chosen = dense_model(family), recipe(nsamples=4, **MODES[mode])
    model = copy.deepcopy(dense)
    if (mode, family) == ("heads", "olmoe"):  # A norm over the queries of all heads.
        with pytest.raises(InputError, match="separate heads"):
            pruned(model, chosen)
        return
    report = pruned(model, chosen)
    before, after = mlp_tensors(dense), mlp_tensors(model)
    if not chosen.structured:
        zeros, size = (sum(f(p) for p in after.values()) for f in (lambda p: int((p == 0).sum()), Tensor.numel))
        assert zeros == sum(m.zeros for r in report.layers for n, m in r.modules.items() if n[0] not in "qkvo")
        # Where rows are compared, each removes int(ratio * columns).
        assert abs(zeros / size - 0.5) < (0.035 if chosen.differs_by_module else 0.015)
        assert all((p == 0).float().mean() > 0.25 for p in after.values())
        assert (zeros == size / 2) or chosen.allocate != "uniform"
    elif chosen.whole_neurons:
        left = {20: 12, 12: 8, 6: 4, 40: 24, 24: 16}  # gate_up_proj holds two matrices.
        for name, old in before.items():
            new = after[name].shape
            shorter = [left.get(n, n) if n != 32 else n for n in old.shape]
            shorter[0] = old.shape[0] if old.ndim == 3 else shorter[0]
            assert list(new) == shorter != list(old.shape)
    else:
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
    assert not torch.allclose(logits(model), logits(dense), atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_state(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits(loaded), logits(model))


def test_effort_stands_for_modes_above() -> None:
    assert all(effort_settings(effort, "unstructured") in MODES.values() for effort in ("good", "best"))
    assert effort_settings("good", "neurons") == {"update": "least-squares"}


@pytest.mark.parametrize(
    ("family", "mode"),
    [("qwen2_moe", "gradual"), ("gpt_oss", "neurons, least-squares"), ("qwen3_moe", "allocate neuronrank")],
)
def test_from_disk_to_disk(family: str, mode: str, tmp_path: Path) -> None:
    """One layer at a time, with hidden states on disk, interrupted and resumed: the bits of the run in memory."""
    source, text, chosen = tmp_path / "source", tmp_path / "text.txt", recipe(nsamples=4, **MODES[mode])
    dense_model(family).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    text.write_text(TEXT)
    model, _, _ = load_model(str(source))
    expected = pruned(model, chosen)
    job = Job(str(source), str(text), save=str(tmp_path / "out"), hidden_states="disk")
    ended: list[int] = []

    def cut(stage: str, done: int, total: int, unit: str) -> None:
        if stage.startswith("calibrating layer 2"):
            raise KeyboardInterrupt
        ended[:] = [done, total] if unit == "micro-batches" else ended

    with pytest.raises(KeyboardInterrupt):
        run_prune(job, chosen, cut)
    result = run_prune(job, chosen, lambda stage, done, total, unit: cut("", done, total, unit))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_state(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits(loaded), logits(model))
    assert (result.total.zeros, result.total.removed) == (expected.total.zeros, expected.total.removed)
    assert ended[0] == ended[1], "all steps were counted"


@pytest.mark.parametrize("mode", ["--update gradual", "--allocate neuronrank", "--allocate both"])
def test_llama_4_is_refused_by_name(mode: str) -> None:
    config = Llama4TextConfig(
        **SIZES | {"num_hidden_layers": 2},
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        intermediate_size_mlp=40,
        attention_chunk_size=16,
    )
    model, (name, value) = random_model(config), mode.removeprefix("--").split()
    before = state(model)
    with pytest.raises(InputError, match=f"{mode} cannot be used on Llama4TextExperts, which multiplies") as error:
        pruned(model, recipe(**{name: value}))
    assert error.value.hint == "leave it out"
    assert same_state(state(model), before)
