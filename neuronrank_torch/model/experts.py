"""Mixtures of experts as stored by transformers: one module per layer, whose two parameters hold all experts."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neuronrank_core.errors import UnsupportedModelError
from neuronrank_torch.model.blocks import Mlp, Projection

#: Parameters of a supported experts module, and the first arguments of its forward.
_PARAMETERS, _ARGUMENTS = {"gate_up_proj", "down_proj"}, ["hidden_states", "top_k_index"]


@dataclass(frozen=True, eq=False)
class Experts:
    """The routed experts of a layer.

    Parameters
    ----------
    module : nn.Module
        Has ``gate_up_proj``, shape (experts, 2 * neurons, hidden_size), and ``down_proj``, shape (experts,
        hidden_size, neurons). Its forward takes hidden states, shape (tokens, hidden_size), and the indices of each
        token's experts, shape (tokens, experts per token).
    """

    module: Any

    @property
    def count(self) -> int:
        """Number of experts."""
        return int(self.module.down_proj.shape[0])

    def mlps(self, index: int) -> tuple[Mlp, ...]:
        """Each expert as an :class:`Mlp`; ``index`` is that of the layer."""
        return tuple(
            Mlp(
                f"{index} expert {expert}",
                self.module,
                {
                    "gate_proj": Projection(self.module, "gate_up_proj", partial(_half, expert=expert, number=0)),
                    "up_proj": Projection(self.module, "gate_up_proj", partial(_half, expert=expert, number=1)),
                    "down_proj": Projection(self.module, "down_proj", partial(_slice, expert=expert)),
                },
                prefix=f"experts.{expert}.",
                expert=expert,
            )
            for expert in range(self.count)
        )

    def on_routed(self, see: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
        """Register a hook that calls ``see`` with the hidden states and the chosen experts at each forward pass."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            hidden, chosen = (args + tuple(kwargs[name] for name in _ARGUMENTS[len(args) :]))[:2]
            see(hidden, chosen)

        handle: RemovableHandle = self.module.register_forward_pre_hook(hook, with_kwargs=True)
        return handle


def _slice(parameter: Tensor, expert: int) -> Tensor:
    return parameter[expert]


def _half(parameter: Tensor, expert: int, number: int) -> Tensor:
    return parameter[expert].chunk(2)[number]


def find_experts(layer: nn.Module, index: int) -> Experts | None:
    """The routed experts of a layer, None if it has none.

    Raises
    ------
    UnsupportedModelError
        If it stores experts in an unsupported layout.
    """
    found = [m for m in layer.modules() if isinstance(down := getattr(m, "down_proj", None), Tensor) and down.ndim == 3]
    if not found:
        return None
    if len(found) > 1 or not _fits(found[0]):
        raise UnsupportedModelError(
            f"layer {index}: {type(found[0]).__name__} stores experts differently from Mixtral and Qwen3-MoE",
            hint="its experts cannot be pruned yet",
        )
    return Experts(found[0])


def _fits(module: Any) -> bool:
    """Whether experts are ``down(act(gate) * up)`` without biases, with gate above up in one fused parameter."""
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


def tokens_of(chosen: Tensor, expert: int, seqlen: int) -> list[Tensor]:
    """Positions of the tokens routed to an expert, for each document.

    Parameters
    ----------
    chosen : int64 Tensor, shape (documents * seqlen, experts per token)
    expert, seqlen : int
    """
    return [torch.nonzero(hit).flatten() for hit in (chosen == expert).any(dim=-1).view(-1, seqlen)]
