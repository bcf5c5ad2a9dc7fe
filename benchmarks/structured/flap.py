"""FLAP: heads and neurons go whose inputs to the output projection vary least; their mean becomes a bias.

An et al. 2023, "Fluctuation-based Adaptive Structured Pruning for Large Language Models", arXiv 2312.11983, with its
defaults WIFV and AL-AM: one threshold for the heads and neurons of all layers. Its code has no grouped-query attention:
here a key-value group goes as a whole, and counts as many neurons as it has parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neuronrank_torch.pruning.passes import outside_embeddings


class Fluctuation:
    """Mean and fluctuation of the inputs of a module, sequence by sequence, as the published code adds them up."""

    def __init__(self, width: int) -> None:
        self.mean, self.fluctuation, self.sequences = torch.zeros(width), torch.zeros(width), 0

    def add(self, inputs: Tensor) -> None:
        """Add the inputs of a sequence, shape (tokens, width)."""
        n = self.sequences
        self.mean = (self.mean * n + inputs.mean(dim=0)) / (n + 1)
        if n:
            spread = (
                (inputs - self.mean).pow(2).sum(dim=0)
            )  # The code's old mean is the new one: it is changed in place.
            self.fluctuation = self.fluctuation * (n - 1) / n + spread / (n + 1)
        self.sequences += 1


def weighted(fluctuation: Tensor, weight: Tensor) -> Tensor:
    """WIFV: the fluctuation of each input times the squared norm of its column."""
    return fluctuation * weight.pow(2).sum(dim=0)


def standardized(metric: Tensor) -> Tensor:
    """Each layer's metric with mean 0 and standard deviation 1."""
    return (metric - metric.mean(dim=1, keepdim=True)) / metric.std(dim=1, keepdim=True)


def chosen(attention: Tensor, mlp: Tensor, size: float, ratio: float) -> tuple[Tensor, Tensor]:
    """Masks of the groups and of the neurons that stay, shapes (layers, groups) and (layers, neurons).

    Parameters
    ----------
    attention, mlp : Tensor
        Standardised metrics.
    size : float
        Parameters of a group over those of a neuron.
    ratio : float
        Share of the parameters of all groups and neurons that goes.
    """
    metric = torch.cat([attention.flatten(), mlp.flatten()])
    ranked, order = metric.sort(descending=True)
    sizes = torch.ones_like(metric)
    sizes[order < attention.numel()] = size
    threshold = ranked[(sizes.cumsum(0) - sizes.sum() * (1 - ratio)).abs().argmin()]
    return attention > threshold, mlp > threshold


class Constant(nn.Module):
    """What is left of an attention without heads."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """The bias for every token."""
        return self.bias.expand_as(hidden_states), None


def narrowed(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    """The linear layer with some of its outputs."""
    linear.weight = nn.Parameter(linear.weight[rows])
    linear.out_features = len(rows)
    return linear


def compensated(linear: nn.Linear, stays: Tensor, mean: Tensor) -> nn.Linear:
    """The linear layer with some of its inputs; what the mean of the others gives becomes its bias."""
    bias = (mean * ~stays) @ linear.weight.T
    linear.weight = nn.Parameter(linear.weight[:, stays])
    linear.in_features = int(stays.sum())
    linear.bias = nn.Parameter(bias if linear.bias is None else linear.bias + bias)
    return linear


@torch.no_grad()
def flap(model: Any, sequences: Tensor, keep: float) -> None:
    """Remove key-value groups and neurons until a share of the parameters outside the embeddings stays."""
    layers = model.model.layers
    measured = [[Fluctuation(m.in_features) for m in (x.self_attn.o_proj, x.mlp.down_proj)] for x in layers]
    hooks = [
        module.register_forward_pre_hook(lambda _, args, to=to: to.add(args[0][0]))
        for layer, pair in zip(layers, measured, strict=True)
        for module, to in zip((layer.self_attn.o_proj, layer.mlp.down_proj), pair, strict=True)
    ]
    for sequence in sequences:
        model.model(sequence[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    groups = model.config.num_key_value_heads
    first = layers[0].self_attn
    neuron = sum(m.weight.numel() for m in layers[0].mlp.children() if isinstance(m, nn.Linear)) / len(
        measured[0][1].mean
    )
    group = sum(m.weight.numel() for m in first.children() if isinstance(m, nn.Linear)) / groups
    metrics = [
        torch.stack([weighted(pair[at].fluctuation, m.weight) for pair, m in zip(measured, modules, strict=True)])
        for at, modules in enumerate(([x.self_attn.o_proj for x in layers], [x.mlp.down_proj for x in layers]))
    ]
    heads = standardized(metrics[0] ** 2).reshape(len(layers), groups, -1).mean(dim=2)  # The code squares it.
    prunable = len(layers) * (neuron * metrics[1].shape[1] + group * groups)
    # The biases are new parameters.
    ratio = ((1 - keep) * outside_embeddings(model) + 2 * len(layers) * model.config.hidden_size) / prunable
    masks = chosen(heads, standardized(metrics[1]), group / neuron, ratio)
    for layer, (of_heads, of_neurons), stay_groups, stay in zip(layers, measured, *masks, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        wide = stay_groups.repeat_interleave(len(of_heads.mean) // groups)
        narrow = stay_groups.repeat_interleave(attention.head_dim)
        compensated(attention.o_proj, wide, of_heads.mean)
        if not stay_groups.any():
            layer.self_attn = Constant(attention.o_proj.bias.detach())
        narrowed(attention.q_proj, wide.nonzero()[:, 0])
        narrowed(attention.k_proj, narrow.nonzero()[:, 0])
        narrowed(attention.v_proj, narrow.nonzero()[:, 0])
        compensated(mlp.down_proj, stay, of_neurons.mean)
        for linear in (mlp.gate_proj, mlp.up_proj):
            narrowed(linear, stay.nonzero()[:, 0])
