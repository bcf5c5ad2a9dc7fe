"""Mixtures of experts as transformers lays them out: one module a layer, whose two parameters hold all experts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuronrank_core import Recipe
from neuronrank_core.errors import InputError, UnsupportedModelError

#: What a module of experts has: its parameters, and the first arguments of its forward.
_PARAMETERS, _ARGUMENTS = {"gate_up_proj", "down_proj"}, ["hidden_states", "top_k_index"]


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer.

    Parameters
    ----------
    module : nn.Module
        With ``gate_up_proj``, shape (experts, 2 * neurons, hidden_size), and ``down_proj``, shape (experts,
        hidden_size, neurons). Its forward takes hidden states, shape (tokens, hidden_size), and the experts that each
        token is routed to, shape (tokens, experts a token).
    """

    module: Any

    def __len__(self) -> int:
        return int(self.module.down_proj.shape[0])

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """Of the gate."""
        activation: Callable[[Tensor], Tensor] = self.module.act_fn
        return activation

    def linears(self, expert: int) -> dict[str, nn.Linear]:
        """Gate, up and down of one expert; their weights are views, so that what is written there stays."""
        gate, up = self.module.gate_up_proj[expert].detach().chunk(2)
        down = self.module.down_proj[expert].detach()
        return {"gate_proj": _linear(gate), "up_proj": _linear(up), "down_proj": _linear(down)}

    def named_linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Those of all experts, by the names that a report gives them."""
        for expert in range(len(self)):
            yield from ((report_name(expert, name), linear) for name, linear in self.linears(expert).items())


def report_name(expert: int, name: str) -> str:
    """Name of an expert's linear layer in a report."""
    return f"experts.{expert}.{name}"


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def find_experts(layer: nn.Module, index: int) -> Experts | None:
    """The routed experts of a layer, None where it has none.

    Raises
    ------
    UnsupportedModelError
        If it has some in another layout, which would be taken for something else.
    """
    found = [m for m in layer.modules() if isinstance(down := getattr(m, "down_proj", None), Tensor) and down.ndim == 3]
    if not found:
        return None
    if len(found) > 1 or not _fits(found[0]):
        raise UnsupportedModelError(
            f"layer {index}: {type(found[0]).__name__} keeps its experts in another layout than Mixtral and Qwen3-MoE",
            hint="its experts cannot be pruned yet",
        )
    return Experts(found[0])


def _fits(module: Any) -> bool:
    """Whether an expert is act(gate) * up of one matrix, gate above up, with the down of another, and nothing more."""
    if {name for name, _ in module.named_parameters()} != _PARAMETERS or not hasattr(module, "act_fn"):
        return False
    experts, hidden, neurons = module.down_proj.shape
    gating = getattr(type(module), "_apply_gate", None)
    return (
        module.gate_up_proj.shape == (experts, 2 * neurons, hidden)
        and getattr(module, "is_concatenated", True)
        and getattr(gating, "__name__", "_default_apply_gate") == "_default_apply_gate"
        and list(inspect.signature(type(module).forward).parameters)[1:3] == _ARGUMENTS
    )


def refuse_modes(layers: list[nn.Module], recipe: Recipe) -> None:
    """Refuse what a model with experts cannot be pruned by.

    Raises
    ------
    InputError
        Names the flag.
    """
    experts = next((found for i, layer in enumerate(layers) if (found := find_experts(layer, i))), None)
    modes = {
        "--sparsity_type neurons": recipe.whole_neurons,
        f"--update {recipe.update}": recipe.update != "none",
        "--allocate neuronrank": recipe.allocate != "uniform",
    }
    for mode, asked in modes.items():
        if asked and experts is not None:
            raise InputError(
                f"{mode} cannot be used on a mixture of experts ({type(experts.module).__name__}: fused tensors of"
                f" {len(experts)} experts)",
                hint="leave it out: experts can be pruned unstructured or N:M, all at one ratio",
            )


def routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Hidden states and chosen experts among the arguments of a call of the experts' module."""
    hidden, chosen = (args + tuple(kwargs[name] for name in _ARGUMENTS[len(args) :]))[:2]
    return hidden, chosen


def tokens_of(chosen: Tensor, expert: int, seqlen: int) -> list[Tensor]:
    """Positions of each document's tokens that are routed to an expert.

    Parameters
    ----------
    chosen : int64 Tensor, shape (documents * seqlen, experts a token)
    expert, seqlen : int
    """
    return [torch.nonzero(hit).flatten() for hit in (chosen == expert).any(dim=-1).view(-1, seqlen)]
