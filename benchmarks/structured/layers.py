"""ShortGPT and ReplaceMe: whole layers go; ReplaceMe folds a linear map in place of them into the layer before.

Men et al. 2024, arXiv 2403.03853; Shopkhoev et al. 2025, arXiv 2505.02819 (``num_A`` 1, least squares, no training).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from neuronrank_torch.pruning.passes import outside_embeddings


def block_influence(entering: Tensor, leaving: Tensor) -> Tensor:
    """One minus the cosine of the hidden states of each token before and after a layer."""
    cosine = nn.functional.cosine_similarity(entering.flatten(0, -2), leaving.flatten(0, -2), dim=-1, eps=0)
    return 1 - cosine.nan_to_num(nan=0.5)


def angular_distance(first: Tensor, second: Tensor) -> Tensor:
    """Angle between the hidden states of each token, as a share of a half turn."""
    return torch.acos(nn.functional.cosine_similarity(first, second, dim=-1, eps=0).clamp(-1, 1)) / torch.pi


def layers_at(model: Any, keep: float) -> tuple[int, int]:
    """How many layers go so that at most, and so that at least, a share of the parameters stays."""
    layers = model.model.layers
    whole, each = outside_embeddings(model), sum(p.numel() for p in layers[0].parameters())
    least = next(n for n in range(len(layers)) if whole - n * each <= keep * whole + each / 100)
    return least, least if abs(whole - least * each - keep * whole) <= each / 100 else least - 1


def hidden_states(model: Any, sequence: Tensor) -> list[Tensor]:
    """What enters the first layer and what leaves each layer for a sequence, without the final norm."""
    found: list[Tensor] = []
    hooks = [model.model.layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))]
    hooks += [x.register_forward_hook(lambda *of: found.append(of[-1])) for x in model.model.layers]
    model.model(sequence[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def keep_layers(model: Any, stay: Sequence[int]) -> None:
    """Remove all other layers."""
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in stay])
    model.config.num_hidden_layers = len(stay)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in stay]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number


@torch.no_grad()
def shortgpt(model: Any, sequences: Tensor, count: int) -> None:
    """Remove the layers with the least mean block influence, measured once on the dense model."""
    influence = torch.zeros(len(model.model.layers), dtype=torch.float64)
    for sequence in sequences:
        states = hidden_states(model, sequence)
        influence += torch.stack([block_influence(a, b).double().mean() for a, b in pairwise(states)])
    gone = set(influence.argsort()[:count].tolist())
    keep_layers(model, [i for i in range(len(influence)) if i not in gone])


@torch.no_grad()
def replaceme(model: Any, sequences: Tensor, count: int) -> None:
    """Replace the consecutive layers whose ends are most alike by a linear map, folded into the MLP before them."""
    layers = model.model.layers
    if hasattr(layers[0], "post_feedforward_layernorm"):
        raise NotImplementedError("a norm between down_proj and the residual stream takes the map's scale away")
    outputs: dict[int, Tensor] = {}
    hooks = [
        layer.mlp.register_forward_hook(lambda module, args, output, i=i: outputs.update({i: output}))
        for i, layer in enumerate(layers)
    ]
    distances = torch.zeros(len(layers) - count)
    for sequence in sequences:
        last = [state[0, -1] for state in hidden_states(model, sequence)[1:]]
        distances += torch.stack([angular_distance(a, b) for a, b in zip(last, last[count:])])  # noqa: B905
    before = int(distances.argmin())
    hidden = model.config.hidden_size
    gram, cross = torch.zeros(2, hidden, hidden, dtype=torch.float64)
    for sequence in sequences:
        states = hidden_states(model, sequence)[1:]
        mlp = outputs[before][0].double()
        gram += mlp.T @ mlp
        cross += mlp.T @ (states[before + count][0].double() + mlp - states[before][0].double())
    for hook in hooks:
        hook.remove()
    down = layers[before].mlp.down_proj
    down.weight.copy_(torch.linalg.solve(gram, cross).T @ down.weight.double())
    keep_layers(model, [i for i in range(len(layers)) if not before < i <= before + count])
