"""LLM-Pruner: key-value groups and neurons go whose weights times their gradients are smallest.

Ma et al. 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models", arXiv 2305.11627, as in
github.com/horseee/LLM-Pruner with the settings of its Llama 3 example: block-wise, first-order Taylor importance of
each parameter, summed over what goes together, one step, the same share in every pruned layer. The first 4 and the last
2 of 32 layers are left alone, and as many in proportion here. A key-value group goes with all its query heads. Its
loss is that of language modelling on 10 texts; here on all calibration sequences. Its LoRA recovery is left out: no
peer is trained.

The number of groups is rounded down, as in its code. Where that leaves too much, more neurons go. One thing differs: a
query head counts for the group that serves it (see ``group_scores``). With one query head a group both are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neuronrank_torch.pruning.passes import outside_embeddings

#: Layers that its examples prune, of the 32 of LLaMA 7B and Llama 3 8B.
FIRST, END, OF = 4, 30, 32


def pruned_layers(model: Any) -> list[Any]:
    """The layers that lose groups and neurons."""
    layers = model.model.layers
    return list(layers[round(FIRST * len(layers) / OF) : round(END * len(layers) / OF)])


def salience(linear: nn.Linear, dim: int) -> Tensor:
    """Absolute weight times gradient, summed for each output (``dim=1``) or each input (``dim=0``)."""
    assert linear.weight.grad is not None
    return (linear.weight * linear.weight.grad).abs().sum(dim)


def neuron_scores(mlp: Any) -> Tensor:
    """Importance of each neuron."""
    return salience(mlp.gate_proj, 1) + salience(mlp.up_proj, 1) + salience(mlp.down_proj, 0)


def group_scores(attention: Any, *, published: bool = False) -> Tensor:
    """Importance of each key-value group with its query heads.

    Parameters
    ----------
    attention : Module
        The attention, with gradients.
    published : bool
        Add up the query heads as the published code does: it gives query head ``i`` to group ``i`` modulo the number
        of groups, though it then removes the consecutive heads that the group serves.
    """
    groups = attention.k_proj.out_features // attention.head_dim
    keys, queries = (
        sum(x.view(-1, attention.head_dim).sum(1) for x in pair)
        for pair in (
            (salience(attention.k_proj, 1), salience(attention.v_proj, 1)),
            (salience(attention.q_proj, 1), salience(attention.o_proj, 0)),
        )
    )
    return keys + (queries.view(-1, groups).sum(0) if published else queries.view(groups, -1).sum(1))


def numbers(model: Any, keep: float) -> tuple[int, int]:
    """Groups and neurons that stay in every pruned layer."""
    layers = pruned_layers(model)
    surplus = (1 - keep) * outside_embeddings(model) / len(layers)
    attention, mlp = layers[0].self_attn, layers[0].mlp
    groups, neurons = attention.k_proj.out_features // attention.head_dim, mlp.down_proj.in_features
    group, neuron = (
        sum(m.weight.numel() for m in of.children() if isinstance(m, nn.Linear)) / number
        for of, number in ((attention, groups), (mlp, neurons))
    )
    for gone in reversed(range(groups)):
        less = -int((gone * group - surplus) // neuron)  # Rounded up.
        if gone / groups <= less / neurons < 1:
            return groups - gone, neurons - less
    raise NotImplementedError(
        f"LLM-Pruner leaves {len(model.model.layers) - len(layers)} layers alone: too little goes"
    )


def part(linear: nn.Linear, stays: Tensor, dim: int) -> None:
    """Some outputs (``dim=0``) or inputs (``dim=1``) of a linear layer."""
    linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, stays))
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[stays])
    linear.out_features, linear.in_features = linear.weight.shape


def highest(scores: Tensor, number: int) -> Tensor:
    """Positions of the highest scores, ascending."""
    return scores.topk(number).indices.sort().values


def narrow(layer: Any, groups: Tensor, neurons: Tensor) -> None:
    """Leave some key-value groups and some neurons in a layer."""
    attention, mlp = layer.self_attn, layer.mlp
    served = attention.q_proj.out_features // attention.k_proj.out_features * attention.head_dim
    keys, queries = ((groups[:, None] * n + torch.arange(n)).flatten() for n in (attention.head_dim, served))
    wide = ((attention.k_proj, keys), (attention.v_proj, keys), (attention.q_proj, queries))
    for linear, stays in (*wide, (mlp.gate_proj, neurons), (mlp.up_proj, neurons)):
        part(linear, stays, 0)
    part(attention.o_proj, queries, 1)
    part(mlp.down_proj, neurons, 1)


def prune(model: Any, sequences: Tensor, keep: float) -> None:
    """Remove key-value groups and neurons until a share of the parameters outside the embeddings stays."""
    groups, neurons = numbers(model, keep)
    model.requires_grad_(False)
    for layer in pruned_layers(model):
        layer.requires_grad_(True)
    for sequence in sequences:
        model(sequence[None], labels=sequence[None], use_cache=False).loss.backward()
    for layer in pruned_layers(model):
        scores = group_scores(layer.self_attn), neuron_scores(layer.mlp)
        narrow(layer, highest(scores[0].detach(), groups), highest(scores[1].detach(), neurons))
    model.requires_grad_(False).zero_grad()
