"""A tiny model run layer by layer, and by itself."""

from __future__ import annotations

from typing import get_args

import torch
from tiny import VOCAB, Family, tiny_model
from torch import Tensor

from neuronrank_torch.calibration.layerwise import LayerRun, run_layers
from neuronrank_torch.model.structure import find_decoder

FAMILIES = get_args(Family)
#: Longer than the sliding windows of the tiny models, which are 16.
SEQLEN = 40


def text(sequences: int = 5, seqlen: int = SEQLEN) -> Tensor:
    return torch.randint(VOCAB, (sequences, seqlen), generator=torch.Generator().manual_seed(1))


def small(family: Family, **options: int) -> torch.nn.Module:
    return tiny_model(family, layers=3, hidden=32, intermediate=48, **options)


@torch.no_grad()
def run(model: torch.nn.Module, tokens: Tensor, batch_size: int) -> list[Tensor]:
    """Hidden states before each layer, and those that leave the final norm."""
    states: list[Tensor] = []

    def visit(layer: LayerRun) -> None:
        states.append(layer.hidden.clone())
        layer.feed(keep=True)

    decoder = find_decoder(model)
    last = run_layers(decoder, tokens, visit, batch_size=batch_size)
    return [*states, decoder.body.norm(last)]


@torch.no_grad()
def expected(model: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """The same from the model, one sequence at a time."""
    each = [model(row[None], output_hidden_states=True, use_cache=False).hidden_states for row in tokens]
    return [torch.cat(states) for states in zip(*each, strict=True)]
