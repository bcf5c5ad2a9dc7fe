"""Tiny models pruned, and the same masks from the core alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Family, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from neuronrank_core import LayerStatistics, Recipe, ScoringContext, document_statistics, merge
from neuronrank_core.methods import method_for
from neuronrank_core.selection.patterns import comparison_group
from neuronrank_torch import Report, prune
from neuronrank_torch.calibration.gram import GramCollector
from neuronrank_torch.pruning import layer as pruning_layer
from neuronrank_torch.text.sequences import calibration_sequences
from neuronrank_torch.text.sources import load_text

#: English with structure: headings, prose, tables, code.
TEXT = load_text("builtin", "calibration")[:8_000]
MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
#: A small corpus for a small model; topics are few enough for it.
SMALL = {"nsamples": 6, "seqlen": 32, "tfidf_k": 8, "tokens_per_document": 16}


def small(family: Family = "llama", layers: int = 2, **options: Any) -> nn.Module:
    return tiny_model(family, layers=layers, hidden=32, intermediate=64, **options)


def random_model(config: Any) -> nn.Module:
    """Every parameter random: biases and sinks far from zero, gains far from one; and what routers add to scores."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape) / (parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1)
        for name, buffer in model.named_buffers():
            if "correction" in name:
                buffer.normal_(std=0.1)
    model.tie_weights()
    return model


def recipe(**chosen: Any) -> Recipe:
    return Recipe(**{**SMALL, **chosen})


def pruned(model: nn.Module, chosen: Recipe, text: str | Iterable[str] = TEXT, **options: Any) -> Report:
    return prune(model, tiny_tokenizer(), chosen, text, **options)


def fit_down_to_its_own_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the update of ``down_proj`` ignore what the pruning of gate and up changed."""
    monkeypatch.setattr(
        pruning_layer, "GramCollector", lambda blocks, inputs, outputs=None, **how: GramCollector(blocks, inputs, **how)
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def linears(model: nn.Module, layer: int) -> dict[str, nn.Linear]:
    """MLP and attention projections of a layer."""
    block = model.model.layers[layer]
    mlp = {name: getattr(block.mlp, name) for name in MLP}
    return mlp | {name: getattr(block.self_attn, name) for name in ATTENTION}


def zeros(model: nn.Module, layer: int, modules: Iterable[str] = MLP) -> dict[str, np.ndarray]:
    found = linears(model, layer)
    return {name: (found[name].weight == 0).numpy() for name in modules}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def core_statistics(model: nn.Module, layer: int, chosen: Recipe, tokenizer: Any = None) -> LayerStatistics:
    """The table of a layer from hooks on a plain run of the whole model, one sequence at a time."""
    found, act = linears(model, layer), model.model.layers[layer].mlp.act_fn
    seen: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: args[0][0], f"{name}:": out[0]})
        )
        for name, linear in found.items()
    ]
    rows = []
    for document, sequence in enumerate(calibration_sequences(tokenizer or tiny_tokenizer(), chosen, TEXT)):
        model(sequence[None], use_cache=False)
        gate, hidden = seen["gate_proj:"], seen["down_proj"]
        signal = {"gate": gate, "activated": act(gate), "product": hidden}[chosen.signal]
        rows.append(
            document_statistics(
                document,
                signal=signal.abs().float().numpy(),
                gate=gate.float().numpy(),
                inputs={name: seen[name].float().numpy() for name in ("gate_proj", "down_proj", "q_proj", "o_proj")},
                threshold=chosen.threshold,
                tokens_per_document=chosen.tokens_per_document,
            )
        )
    for hook in hooks:
        hook.remove()
    return merge(rows)


def core_scores(dense: nn.Module, layer: int, chosen: Recipe, table: LayerStatistics | None = None) -> dict[str, Any]:
    """Scores of a layer's modules by the core on NumPy weights in double precision."""
    weights = {name: x.weight.detach().double().numpy() for name, x in linears(dense, layer).items()}
    table = core_statistics(dense, layer, chosen) if table is None else table
    context = ScoringContext(layer, chosen, weights, table)
    return {name: method_for(name, chosen).score(name, context) for name in weights}


def disagreements(mask: np.ndarray, score: np.ndarray, module: str, chosen: Recipe, margin: float = 1e-4) -> int:
    """Weights that a mask treats otherwise than the score asks for, near-ties with the threshold left out."""
    compare = chosen.compare or method_for(module, chosen).compare(module)
    size, k = comparison_group(score.shape, ratio=chosen.ratio, compare=compare, pattern=chosen.pattern)
    if compare == "column" and not chosen.pattern:
        score, mask = score.T, mask.T
    rows, marked = score.reshape(-1, size), mask.reshape(-1, size)
    assert (marked.sum(axis=1) == k).all()
    threshold = np.sort(rows, axis=1)[:, k - 1 : k + 1]
    wrong = (marked & (rows > threshold[:, 1:] * (1 - margin)) & (rows > threshold[:, :1] * (1 + margin))) | (
        ~marked & (rows < threshold[:, :1] * (1 + margin)) & (rows < threshold[:, 1:] * (1 - margin))
    )
    return int(wrong.sum())


def with_layer_of(model: nn.Module, dense: nn.Module, layer: int) -> nn.Module:
    """A copy of a pruned model with one layer as it was."""
    mixed = copy.deepcopy(model)
    mixed.model.layers[layer].load_state_dict(dense.model.layers[layer].state_dict())
    return mixed


@torch.no_grad()
def seen(model: Any, modules: list[nn.Module], chosen: Recipe) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of modules in plain passes, shape (documents, tokens, features)."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {id(module): [] for module in modules}
    hooks = [m.register_forward_hook(lambda m, a, out: found[id(m)].append((a[0], out))) for m in modules]
    for sequence in calibration_sequences(tiny_tokenizer(), chosen, TEXT):
        model(sequence[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    shape = (chosen.nsamples, chosen.seqlen, -1)
    pairs = (map(torch.cat, zip(*found[id(m)], strict=True)) for m in modules)
    return [(x.reshape(shape), y.reshape(shape)) for x, y in pairs]
