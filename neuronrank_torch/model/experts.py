"""Mixtures of experts as stored by transformers: one module per layer, whose parameters hold all experts."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from neuronrank_core.errors import UnsupportedModelError
from neuronrank_torch.model.blocks import Mlp, Projection, whole

#: Second arguments of a supported forward, after the hidden states. Llama 4's has none.
_CHOSEN = ("top_k_index", "router_indices")
#: Attributes with the number of neurons of an expert.
_WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim")


@dataclass(frozen=True, eq=False)
class Experts:
    """The routed experts of a layer.

    Parameters
    ----------
    module : nn.Module
        Has the parameters ``gate_up_proj`` (``up_proj`` in experts without a gate) and ``down_proj``, with one matrix
        per expert, and optionally a bias for each.
    transposed : bool
        Whether a matrix is stored as (in_features, out_features).
    """

    module: Any
    transposed: bool = False

    @property
    def count(self) -> int:
        """Number of experts."""
        return int(self.module.down_proj.shape[0])

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate."""
        return hasattr(self.module, "gate_up_proj")

    @property
    def _producer(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"

    def mlps(self, index: int) -> tuple[Mlp, ...]:
        """Each expert as an :class:`Mlp`; ``index`` is that of the layer."""
        return tuple(
            Mlp(
                f"{index} expert {expert}",
                self.module,
                self.projections_of(expert),
                prefix=f"experts.{expert}.",
                activation_name="" if _has_own_gate(self.module) else "act_fn",
                expert=expert,
            )
            for expert in range(self.count)
        )

    @property
    def weighted(self) -> bool:
        """Whether the module gets the indices of the chosen experts and the factors of their outputs."""
        arguments = list(inspect.signature(type(self.module).forward).parameters)
        return len(arguments) > 3 and arguments[2] in _CHOSEN

    def projections(self) -> dict[str, Projection]:
        """The matrices of all experts by role, of shape (experts, out_features, in_features)."""
        return self.projections_of(None)

    def projections_of(self, expert: int | None) -> dict[str, Projection]:
        """The matrices of an expert by role; None for those of all."""
        part = partial(_matrix, expert=expert, transposed=self.transposed)
        found = {}
        for role, take in (self._halves or {"up_proj": whole}).items():
            of, own = partial(_rows, part, take), partial(_own, take, expert)
            found[role] = Projection(self.module, self._producer, of, own, f"{self._producer}_bias")
        own = partial(_own, whole, expert)
        return {**found, "down_proj": Projection(self.module, "down_proj", part, own, "down_proj_bias")}

    @property
    def _halves(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The parts of the last dimension of what gate and up compute together."""
        interleaved = not getattr(self.module, "is_concatenated", True)
        roles = ("gate_proj", "up_proj") if self.gated else ()
        return {role: partial(_half, number=i, interleaved=interleaved) for i, role in enumerate(roles)}

    def on_routed(self, see: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
        """Register a hook on the routing, called at each forward pass.

        ``see`` gets the inputs of each expert, shape (experts, tokens, hidden_size), and which of these tokens are
        routed to it, shape (experts, tokens).
        """

        def look(hidden: Tensor, *others: Tensor) -> None:
            hidden = hidden.flatten(0, -2)
            if not others:  # Llama 4: all tokens for each expert, times the router's score; zero if not routed to it.
                inputs = hidden.reshape(self.count, -1, hidden.shape[-1])
                see(inputs, inputs.any(dim=-1))
                return
            experts = torch.arange(self.count, device=others[0].device)
            see(hidden.expand(self.count, *hidden.shape), (others[0] == experts[:, None, None]).any(dim=-1))

        return self._before(look)

    def on_tokens(self, see: Callable[[Tensor, Tensor, Tensor], None]) -> RemovableHandle:
        """Register a hook on what the module gets, called at each forward pass; only if :attr:`weighted`.

        ``see`` gets the inputs, shape (tokens, hidden_size), the indices of the chosen experts and the factors of their
        outputs, both of shape (tokens, chosen).
        """
        return self._before(lambda hidden, chosen, factors, *_: see(hidden.flatten(0, -2), chosen, factors))

    def on_contributions(self, see: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> list[RemovableHandle]:
        """Register hooks on what each expert adds, called at each forward pass; only if :attr:`weighted`.

        ``see`` gets the inputs of the module, shape (tokens, hidden_size); and of shape (tokens, experts): which tokens
        are routed to which expert, the factors of the outputs, and the norms of the outputs without them. The module
        itself computes the outputs, once: it gets each token once for every chosen expert, with a factor of one, and
        what it returns is summed with the factors.
        """
        routing: list[Tensor] = []

        def separate(hidden: Tensor, chosen: Tensor, factors: Tensor, *others: Any) -> tuple[Any, ...]:
            routing[:] = hidden, chosen, factors
            each = hidden.flatten(0, -2).repeat_interleave(chosen.shape[-1], 0)
            return each, chosen.reshape(-1, 1), torch.ones_like(factors).view(-1, 1), *others

        def add_up(module: nn.Module, args: tuple[Any, ...], outputs: Tensor) -> Tensor:
            del module, args
            hidden, chosen, factors = routing
            norms = torch.linalg.vector_norm(outputs.float(), dim=-1).view_as(chosen)
            empty = norms.new_zeros(len(chosen), self.count)
            routed = empty.bool().scatter(1, chosen, True)
            inputs = hidden.flatten(0, -2)
            see(inputs, routed, empty.scatter(1, chosen, factors.float()), empty.scatter(1, chosen, norms))
            total = (outputs.view(*chosen.shape, -1) * factors[..., None]).sum(1)
            return total.to(outputs.dtype).view_as(hidden)

        return [self._before(separate), self.module.register_forward_hook(add_up)]

    def _before(self, see: Callable[..., tuple[Any, ...] | None]) -> RemovableHandle:
        """Register a hook that gets the arguments of the module's forward, and replaces them by what it returns."""
        forward = inspect.signature(type(self.module).forward)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            bound = forward.bind(module, *args, **kwargs)
            changed = see(*bound.args[1:])
            return None if changed is None else (changed, bound.kwargs)

        handle: RemovableHandle = self.module.register_forward_pre_hook(hook, with_kwargs=True)
        return handle

    def activations(self, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output of an expert's gate (of ``up_proj`` without a gate) and input of its ``down_proj``.

        Biases are included, and the module's own function combines gate and up.

        Parameters
        ----------
        expert : int
        x : Tensor, shape (tokens, hidden_size)

        Returns
        -------
        gate, product : Tensor, shape (tokens, neurons)
        """
        module: Any = self.module
        bias = getattr(module, f"{self._producer}_bias", None)
        weight = _matrix(getattr(module, self._producer), expert, self.transposed)
        both = linear(x, weight, None if bias is None else bias[expert])
        if not self.gated:
            return both, module.act_fn(both)
        gate, up = (half(both) for half in self._halves.values())
        return gate, module._apply_gate(both) if hasattr(module, "_apply_gate") else module.act_fn(gate) * up

    def outputs(self, expert: int, product: Tensor) -> Tensor:
        """What an expert makes of the inputs of its ``down_proj``, shape (tokens, hidden_size)."""
        down = self.projections_of(expert)["down_proj"]
        return linear(product, down.weight, down.bias)

    @property
    def neurons(self) -> int:
        """Number of neurons of each expert."""
        return int(self.module.down_proj.shape[1 if self.transposed else 2])

    def keep_neurons(self, kept: Tensor) -> None:
        """Remove all other neurons of every expert.

        Parameters
        ----------
        kept : int64 Tensor, shape (experts, kept)
            Indices of the neurons that each expert keeps, ascending.
        """
        positions = torch.arange((1 + self.gated) * self.neurons, device=kept.device)
        halves = self._halves.values() or [whole]
        rows = torch.cat([half(positions)[kept] for half in halves], dim=1).sort(dim=1).values
        axes = {self._producer: (rows, 1 if self.transposed else 0), f"{self._producer}_bias": (rows, 0)}
        axes["down_proj"] = kept, 0 if self.transposed else 1
        for name, parameter in list(self.module.named_parameters(recurse=False)):
            if name in axes:
                entries, axis = axes[name]
                parts = zip(parameter.detach(), entries.to(parameter.device), strict=True)
                shorter = torch.stack([part.index_select(axis, own) for part, own in parts])
                setattr(self.module, name, nn.Parameter(shorter, requires_grad=parameter.requires_grad))
        self.count_neurons()

    def count_neurons(self) -> None:
        """Set the number of neurons that the module holds to that of its tensors."""
        for name in _WIDTHS:
            if hasattr(self.module, name):
                setattr(self.module, name, self.neurons)


def _matrix(parameter: Tensor, expert: int | None, transposed: bool) -> Tensor:
    """The matrix of an expert; None for those of all."""
    own = parameter if expert is None else parameter[expert]
    return own.mT if transposed else own


def _own(take: Callable[[Tensor], Tensor], expert: int | None, bias: Tensor) -> Tensor:
    """The part of a bias of all experts that belongs to one and to a role."""
    return take(bias if expert is None else bias[expert])


def _rows(matrix: Callable[[Tensor], Tensor], take: Callable[[Tensor], Tensor], parameter: Tensor) -> Tensor:
    return take(matrix(parameter).mT).mT


def _half(x: Tensor, number: int, interleaved: bool) -> Tensor:
    return x[..., number::2] if interleaved else x.chunk(2, dim=-1)[number]


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
    experts = resolved(found[0])
    if len(found) > 1 or experts is None:
        raise UnsupportedModelError(
            f"layer {index}: {type(found[0]).__name__} stores experts differently from the supported families",
            hint="its experts cannot be pruned yet",
        )
    return experts


def resolved(module: Any) -> Experts | None:
    """The experts of a module; None if it has other parameters or another forward than those described above."""
    names = {name for name, _ in module.named_parameters()}
    gated = "gate_up_proj" in names
    matrices = {"gate_up_proj" if gated else "up_proj", "down_proj"}
    if names not in (matrices, matrices | {f"{name}_bias" for name in matrices}):
        return None
    shape = tuple(module.gate_up_proj.shape if gated else module.up_proj.shape)
    count, rows, columns = module.down_proj.shape
    width = 2 if gated else 1
    straight, turned = (count, width * columns, rows), (count, columns, width * rows)
    transposed = bool(getattr(module, "is_transposed", shape != straight))
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if (
        shape != (turned if transposed else straight)
        or arguments[:1] != ["hidden_states"]
        or (len(arguments) > 1 and arguments[1] not in _CHOSEN)
        or not (hasattr(module, "act_fn") or (gated and _has_own_gate(module)))
    ):
        return None
    return Experts(module, transposed)


def _has_own_gate(module: nn.Module) -> bool:
    """Whether gate and up are combined otherwise than by ``act_fn(gate) * up``, as with clamps."""
    function = getattr(type(module), "_apply_gate", None)
    return getattr(function, "__name__", "_default_apply_gate") != "_default_apply_gate"
