"""Takes neurons out of a gated MLP, so that an ordinary, smaller one remains."""

from __future__ import annotations

from torch import Tensor, nn


def remove_neurons(mlp: nn.Module, linears: dict[str, nn.Linear], kept: Tensor, down_weight: Tensor) -> None:
    """Keep only some neurons: gate and up lose rows, down loses columns.

    Parameters
    ----------
    mlp : nn.Module
        The gated MLP; its ``intermediate_size`` attribute follows, where it has one.
    linears : dict of nn.Linear
        Its ``gate_proj``, ``up_proj`` and ``down_proj``.
    kept : int64 Tensor, shape (kept,)
        Neurons that stay, ascending.
    down_weight : Tensor, shape (out_features, kept)
        New weight of ``down_proj``.
    """
    for name in ("gate_proj", "up_proj"):
        linear = linears[name]
        linear.weight = nn.Parameter(linear.weight[kept].clone(), requires_grad=linear.weight.requires_grad)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[kept].clone(), requires_grad=linear.bias.requires_grad)
        linear.out_features = len(kept)
    down = linears["down_proj"]
    new = down_weight.to(down.weight.dtype).clone()
    down.weight = nn.Parameter(new, requires_grad=down.weight.requires_grad)
    down.in_features = len(kept)
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = len(kept)  # type: ignore[assignment]
