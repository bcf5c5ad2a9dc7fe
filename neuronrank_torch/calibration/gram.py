"""Gram matrices of the inputs of linear layers, for the weight update after masking."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from neuronrank_core.errors import NonFiniteError
from neuronrank_torch.distributed.ranks import Ranks


class GramCollector:
    """Sums ``X' X`` over the calibration tokens while they run through a layer; a context manager.

    Parameters
    ----------
    index : int
        The layer's number, named in errors.
    linears : dict of nn.Linear
    names : iterable of str
        Layers whose inputs are wanted; see ``SHARED_INPUT`` for those they stand for.
    dense_product : callable, optional
        From the MLP's input to what the dense gate and up would hand to ``down_proj``. Given where gate and up have
        changed: ``cross`` then holds ``H_dense' H``, from which the dense layer's outputs can be fitted.
    """

    def __init__(
        self,
        index: int,
        linears: dict[str, nn.Linear],
        names: Iterable[str],
        dense_product: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.index, self.linears, self.names, self.dense_product = index, linears, tuple(names), dense_product
        self.gram = {name: self._zeros(name) for name in self.names}
        crossed = dense_product is not None and "down_proj" in self.names
        self.cross = self._zeros("down_proj") if crossed else None
        self._expected: Tensor | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> GramCollector:
        if self.dense_product is not None:
            self._hooks.append(self.linears["gate_proj"].register_forward_pre_hook(self._expect))
        for name in self.names:
            self._hooks.append(self.linears[name].register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._expected = None
        if error is None and not all(bool(gram.isfinite().all()) for gram in self.gram.values()):
            raise NonFiniteError(f"NaN or Inf in the inputs of layer {self.index}", hint="try --dtype float32")

    def _zeros(self, name: str) -> Tensor:
        inputs = self.linears[name].weight.shape[1]
        return self.linears[name].weight.new_zeros(inputs, inputs, dtype=torch.float32)

    def sum_over(self, ranks: Ranks) -> None:
        """Add what the other ranks have summed, when all text has run."""
        self.gram = {name: ranks.sum_in_order(gram) for name, gram in self.gram.items()}
        self.cross = None if self.cross is None else ranks.sum_in_order(self.cross)

    def _expect(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        if self.dense_product is not None:
            self._expected = self.dense_product(args[0]).flatten(0, -2).float()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            del module
            x = args[0].flatten(0, -2).float()
            self.gram[name].addmm_(x.T, x)
            if name == "down_proj" and self.cross is not None and self._expected is not None:
                self.cross.addmm_(self._expected.T, x)

        return hook


def gated_product(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a gated MLP of these weights hands to ``down_proj``, shape (..., neurons)."""
    return activation(linear(x, gate)) * linear(x, up)
