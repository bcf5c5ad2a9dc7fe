"""The protocol of published figures, in one command, on a random model with the shape of OPT-125m's layers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pruning import TEXT
from tiny import VOCAB
from tokenizers import pre_tokenizers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, OPTConfig

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real model")]
SEQLEN = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of OPT-125m's shape, few tokens; the tokenizer begins a text with ``</s>`` as OPT's does."""
    folder = tmp_path_factory.mktemp("opt-125m")
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    GPT2Tokenizer(vocab, [], **special, pad_token="<pad>", add_bos_token=True).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        small = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "num_hidden_layers": 4}
        opt = AutoModelForCausalLM.from_config(OPTConfig(**small))
        for name, parameter in opt.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3 if name.endswith("bias") else 0.1)
    config = opt.config
    assert (config.hidden_size, config.ffn_dim, config.max_position_embeddings) == (768, 3072, SEQLEN)
    opt.save_pretrained(folder)
    return folder


@torch.no_grad()
def perplexity(folder: Path, text: str) -> float:
    """By the published scripts: the text tokenised once, BOS at its start, the first window of it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor(tokenizer(text).input_ids[:SEQLEN])
    assert tokens[0] == tokenizer.bos_token_id
    return math.exp(cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:]))


def test_one_command_runs_it(model: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT[:SEQLEN] * 3)
    options = ["--prune_method", "wanda", "--sparsity_ratio", 0.5, "--nr-include-attention", "--dataset", text]
    budget = ["--nsamples", 1, "--seqlen", SEQLEN, "--bos", "text"]
    evaluation = ["--eval", "--eval-dataset", text, "--eval-windows", 1]
    arguments = ["--model", model, *options, *budget, *evaluation, "--save", out, "--json"]
    command = [sys.executable, "-m", "neuronrank_cli", "prune", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for when, folder in (("before", model), ("after", out)):
        found = report["perplexity"][when]
        assert found["perplexity"] == pytest.approx(perplexity(folder, text.read_text()), rel=1e-4)
    dense, pruned = (AutoModelForCausalLM.from_pretrained(folder).model.decoder.layers for folder in (model, out))
    for before, after in zip(dense, pruned, strict=True):
        linears = {name: module for name, module in after.named_modules() if isinstance(module, nn.Linear)}
        assert len(linears) == 6
        for name, linear in linears.items():
            assert ((linear.weight == 0).sum(dim=1) == linear.in_features // 2).all()
            assert torch.equal(linear.bias, before.get_submodule(name).bias)
