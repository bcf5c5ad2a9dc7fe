"""What each expert of a layer sees, found token by token in plain Python and NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pruning import TEXT, recipe, small
from tiny import tiny_tokenizer
from torch import nn

from neuronrank_core import LayerStatistics, Recipe, ScoringContext, document_statistics, merge
from neuronrank_core.methods import method_for
from neuronrank_torch.text.sequences import calibration_sequences

MOE = ("mixtral", "qwen3_moe")
Array = np.ndarray[Any, Any]


def mixture(family: str, layers: int = 2, **options: Any) -> nn.Module:
    return small(family, layers=layers, **options)


def experts_of(model: nn.Module, layer: int) -> Any:
    return model.model.layers[layer].mlp.experts


def weights_of(model: nn.Module, layer: int, expert: int) -> dict[str, Array]:
    """An expert's matrices in double precision, cut out of the fused tensors by hand."""
    fused, neurons = experts_of(model, layer), experts_of(model, layer).intermediate_dim
    gate_up = fused.gate_up_proj[expert].detach().double().numpy()
    down = fused.down_proj[expert].detach().double().numpy()
    return {"gate_proj": gate_up[:neurons], "up_proj": gate_up[neurons:], "down_proj": down}


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def seen_by_experts(mlp: nn.Module, document: Array) -> dict[int, Array]:
    """Rows of a document's (tokens, hidden) input that the router sends to each expert, those two it likes most."""
    router = mlp.gate.weight.detach().double().numpy()
    routed: dict[int, list[Array]] = {}
    for token in document:
        liking = [float(token @ row) for row in router]
        for expert in sorted(range(len(liking)), key=lambda e: -liking[e])[:2]:
            routed.setdefault(expert, []).append(token)
    return {expert: np.stack(rows) for expert, rows in routed.items()}


def row_of(number: int, x: Array, gate: Array, product: Array, signal: Array, chosen: Recipe) -> LayerStatistics:
    """The core's row of a document, from an expert's activations on its tokens there."""
    return document_statistics(
        number,
        signal=abs(signal),
        gate=gate,
        inputs={"gate_proj": x, "down_proj": product},
        threshold=chosen.threshold,
        tokens_per_document=chosen.tokens_per_document,
    )


def tables(model: nn.Module, layer: int, documents: list[Array], chosen: Recipe) -> dict[int, LayerStatistics]:
    """The core's table of each expert that saw any token, from the inputs of the layer's mixture."""
    rows: dict[int, list[LayerStatistics]] = {}
    for number, document in enumerate(documents):
        for expert, x in seen_by_experts(model.model.layers[layer].mlp, document).items():
            weight = weights_of(model, layer, expert)
            gate = x @ weight["gate_proj"].T
            product = silu(gate) * (x @ weight["up_proj"].T)
            signal = {"gate": gate, "activated": silu(gate), "product": product}[chosen.signal]
            rows.setdefault(expert, []).append(row_of(number, x, gate, product, signal, chosen))
    return {expert: merge(found) for expert, found in rows.items()}


@torch.no_grad()
def inputs(model: nn.Module, layer: int, chosen: Recipe) -> list[Array]:
    """What enters a layer's mixture in a plain run of the whole model, sequence by sequence, shape (tokens, hidden)."""
    seen: list[Array] = []
    hook = model.model.layers[layer].mlp.register_forward_pre_hook(
        lambda module, args: seen.append(args[0][0].double().numpy())
    )
    for sequence in calibration_sequences(tiny_tokenizer(), chosen, TEXT):
        model(sequence[None], use_cache=False)
    hook.remove()
    return seen


def scores(model: nn.Module, layer: int, chosen: Recipe) -> Iterator[tuple[int, str, Array]]:
    """Scores of every expert's modules by the core alone, from its own tokens."""
    for expert, table in tables(model, layer, inputs(model, layer, chosen), chosen).items():
        context = ScoringContext(layer, chosen, weights_of(model, layer, expert), table)
        for name in context.weights:
            yield expert, name, method_for(name, chosen).score(name, context)


__all__ = ["MOE", "experts_of", "inputs", "mixture", "recipe", "scores", "tables", "weights_of"]
