"""SmolLM2-135M for truth: pruned through the command line, loaded by plain transformers, writing text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuronrank_torch import Recipe, prune
from neuronrank_torch.evaluation.perplexity import evaluate
from neuronrank_torch.model.open import load_model
from neuronrank_torch.text.sources import load_text

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real model")]
MODEL = "builtin:smollm2-135m"


def neuronrank(*arguments: object) -> dict[str, Any]:
    """Run the command as a user would and return what it prints with --json."""
    command = [sys.executable, "-m", "neuronrank_cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def dense() -> tuple[Any, Any]:
    model, tokenizer, _ = load_model(MODEL)
    return model, tokenizer


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("real") / "pruned"
    budget = ("--nsamples", 4, "--seqlen", 128, "--eval-windows", 4)
    return folder, neuronrank("prune", "--model", MODEL, *budget, "--eval", "--save", folder)


def test_every_module_loses_exactly_half(output: tuple[Path, dict[str, Any]]) -> None:
    folder, report = output
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(report["layers"]) == len(model.model.layers) == 30
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2


def test_perplexity_pays_but_does_not_collapse(output: tuple[Path, dict[str, Any]]) -> None:
    before, after = (output[1]["perplexity"][when]["perplexity"] for when in ("before", "after"))
    assert before < after < 4 * before


def test_eval_of_the_saved_folder_says_the_same(output: tuple[Path, dict[str, Any]]) -> None:
    folder, report = output
    measured = neuronrank("eval", "--model", folder, "--seqlen", 128, "--windows", 4)
    assert measured["perplexity"] == pytest.approx(report["perplexity"]["after"]["perplexity"], rel=1e-4)


def test_plain_transformers_loads_it_and_writes_text(output: tuple[Path, dict[str, Any]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(output[0])
    tokenizer = AutoTokenizer.from_pretrained(output[0])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(written[0][prompt["input_ids"].shape[1] :])
    assert len(set(text.split())) > 2, text


def test_neurons_between_and_the_updates_pay_in_perplexity(dense: tuple[Any, Any]) -> None:
    model, tokenizer = dense
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = load_text("builtin", "calibration"), load_text("builtin", "evaluation")

    def after(**chosen: Any) -> float:
        model.load_state_dict(weights)
        prune(model, tokenizer, Recipe(nsamples=4, seqlen=256, pruning_last=2, **chosen), texts[0])
        return evaluate(model, tokenizer, texts[1], seqlen=256, windows=2).perplexity

    wanda, ours = after(method="wanda"), after()
    updated = [after(update=update) for update in ("least-squares", "gradual")]
    model.load_state_dict(weights)
    assert max(updated) < ours < wanda


def test_torch_keeps_the_contract() -> None:
    result = neuronrank("verify", "--model", MODEL, "--device", "cpu", "--layers", 2)
    assert result["holds"]
    for layer in result["layers"]:
        assert layer["checks"]["topics"]["size"] == 4 * 64
        assert layer["checks"]["down_proj mask"]["size"] == 576 * 1536
