"""What cannot be done with experts is refused by name; nothing is pruned in part without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixture import mixture
from pruning import TEXT, pruned, random_model, recipe, same_state, state
from tiny import VOCAB, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, InklingTextConfig, Llama4TextConfig

from neuronrank_core.errors import UnsupportedModelError
from neuronrank_torch.model.experts import find_experts
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.runs.collect import run_collect
from neuronrank_torch.runs.dry_run import plan_prune
from neuronrank_torch.runs.evaluate import run_eval
from neuronrank_torch.runs.job import Evaluation, Job
from neuronrank_torch.runs.verify.run import run_verify

COMMON = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
}


def another_layout() -> nn.Module:
    """Routed experts in the usual layout, and shared ones in a module of their own kind."""
    own = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 8}
    experts = {"n_routed_experts": 4, "n_shared_experts": 2, "moe_intermediate_size": 16}
    return AutoModelForCausalLM.from_config(InklingTextConfig(**COMMON, **own, **experts))


def test_a_plan_names_what_a_run_does(tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    plan = plan_prune(Job(str(write(tmp_path, model))), recipe(sparsity_ratio=0.37))
    done = pruned(model, recipe(sparsity_ratio=0.37, method="wanda"))
    assert [list(layer.modules) for layer in plan.layers] == [list(x.modules) for x in done.layers]
    assert plan.total.prunable == done.total.prunable


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (another_layout, r"layer 0: InklingExperts stores experts differently"),
    ],
)
def test_layouts(model: Any, message: str, tmp_path: Path) -> None:
    made = model()
    before = state(made)
    with pytest.raises(UnsupportedModelError, match=message) as error:
        pruned(made, recipe())
    assert error.value.hint
    assert same_state(state(made), before)
    # It can be measured all the same.
    (tmp_path / "text.txt").write_text(TEXT)
    folder = write(tmp_path, made)
    assert run_eval(str(folder), Evaluation(str(tmp_path / "text.txt"), 16, 1)).perplexity > 1


def test_verify(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 0 .MixtralDecoderLayer. is a mixture of experts") as error:
        run_verify(str(write(tmp_path, mixture("mixtral"))), nsamples=1, seqlen=16)
    assert "prune" in error.value.hint


def test_collect(tmp_path: Path) -> None:
    own = {
        "num_local_experts": 4,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 40,
        "attention_chunk_size": 16,
    }
    model = random_model(Llama4TextConfig(**COMMON | {"num_experts_per_tok": 1}, **own))
    folder = write(tmp_path, model)
    (tmp_path / "text.txt").write_text(TEXT)
    job = Job(str(folder), dataset=str(tmp_path / "text.txt"), save=str(tmp_path / "stats"))
    message = "Llama4TextExperts multiplies the inputs of its experts"
    with pytest.raises(UnsupportedModelError, match=message):
        run_collect(job, recipe())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([folder.name, "text.txt"])
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=message):
        pruned(model, recipe(sparsity_type="experts", method="reap"))
    assert same_state(state(model), before)


@pytest.mark.parametrize("change", ["swapped", "turned", "own forward", "one bias", "no activation", "norm"])
def test_experts_that_only_look_alike(change: str) -> None:
    model = mixture("mixtral")
    experts = model.model.layers[1].mlp.experts
    if change == "swapped":
        experts.gate_up_proj.data = experts.gate_up_proj.data.transpose(1, 2)
    elif change == "turned":
        experts.is_transposed = True
    elif change == "own forward":
        experts.__class__ = type("Own", (type(experts),), {"forward": lambda self, hidden_states, scores: scores})
    elif change == "one bias":
        experts.down_proj_bias = nn.Parameter(torch.zeros(4, 32))
    elif change == "no activation":
        del experts.act_fn
    else:
        experts.norm = nn.LayerNorm(4)
    assert find_experts(model.model.layers[0], 0) is not None
    with pytest.raises(UnsupportedModelError, match=r"layer 1: .* stores experts differently"):
        find_decoder(model)


def write(folder: Path, model: nn.Module) -> Path:
    model.save_pretrained(folder / "model")
    tiny_tokenizer(True).save_pretrained(folder / "model")
    return folder / "model"
