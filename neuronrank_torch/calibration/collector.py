"""Collects the statistics of one layer with hooks, one table row per document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuronrank_core.errors import InputError, NonFiniteError
from neuronrank_core.methods import requires
from neuronrank_core.recipe import Recipe
from neuronrank_core.statistics.table import (
    INPUTS,
    SAMPLE,
    SHARED_INPUT,
    SIGNAL,
    LayerStatistics,
    merge,
    sample_positions,
)
from neuronrank_torch import kernels
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.model.structure import Decoder

Columns = dict[str, Tensor]


class LayerCollector:
    """Watches a layer while micro-batches of equally long documents without padding run through it.

    Use as a context manager; hooks are there inside it alone. Reductions happen inside the hooks, while the
    activations are still in the cache, and only the rows stay.

    Parameters
    ----------
    index : int or str
        The layer's number, named in errors.
    linears : dict of nn.Module
        From :func:`neuronrank_torch.model.structure.prunable_linears`.
    activation : callable
        The MLP's activation function.
    recipe : Recipe
        Says which statistics are needed, of which signal.
    """

    def __init__(
        self,
        index: int | str,
        linears: Mapping[str, nn.Module],
        activation: Callable[[Tensor], Tensor],
        recipe: Recipe,
    ) -> None:
        self.index, self.linears, self.activation, self.recipe = index, linears, activation, recipe
        self._requires = requires(recipe)
        self._rows: list[LayerStatistics] = []
        self._batch: Columns = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> LayerCollector:
        for name, linear in self.linears.items():
            if INPUTS in self._requires and name not in SHARED_INPUT:
                self._hooks.append(linear.register_forward_pre_hook(self._input_hook(name)))
        if self._requires & {SIGNAL, SAMPLE}:
            self._hooks.append(self.linears["gate_proj"].register_forward_hook(self._gate_hook))
            self._hooks.append(self.linears["down_proj"].register_forward_pre_hook(self._product_hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _input_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            del module
            self._batch[f"input_mean_square.{name}"] = kernels.mean_square(args[0])

        return hook

    def _gate_hook(self, module: nn.Module, args: tuple[Any, ...], gate: Tensor) -> None:
        del module, args
        if SIGNAL in self._requires:
            self._batch["open_gate"] = kernels.open_gates(gate, self.recipe.threshold)
        if self.recipe.signal != "product":
            self._signal(gate if self.recipe.signal == "gate" else self.activation(gate))

    def _product_hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        if self.recipe.signal == "product":
            self._signal(args[0])

    def _signal(self, activation: Tensor) -> None:
        """Reduce a (documents, tokens, neurons) activation to the columns of its documents."""
        if SAMPLE in self._requires:
            kept = sample_positions(activation.shape[1], self.recipe.tokens_per_document)
            self._batch["sample"] = activation[:, torch.as_tensor(kept, device=activation.device)].abs().float()
        if SIGNAL in self._requires:
            mean, square, peak = kernels.signal_moments(activation)
            self._batch |= {"signal_mean": mean, "signal_mean_square": square, "signal_max": peak}
        elif not activation.sum(dtype=torch.float32).isfinite():
            # The moments would tell; the sample holds some tokens alone. A sum is cheaper than a look at each value.
            raise self._non_finite("signal")

    def _non_finite(self, name: str) -> NonFiniteError:
        return NonFiniteError(
            f"NaN or Inf in {name} of layer {self.index}", hint="check the model's weights, or try --dtype float32"
        )

    def add_documents(self, first: int, tokens: int) -> None:
        """Turn what the hooks saw since the last call into rows.

        Parameters
        ----------
        first : int
            Number of the micro-batch's first document; the others follow.
        tokens : int
            Length of each document.

        Raises
        ------
        NonFiniteError
            If a statistic is NaN or Inf.
        """
        if not self._requires:
            return
        columns = {name: np.asarray(column.cpu()) for name, column in self._batch.items()}
        self._batch = {}
        for name, column in columns.items():
            if not np.isfinite(column).all():
                raise self._non_finite(name.split(".")[-1])
        documents = len(next(iter(columns.values())))
        plain: dict[str, Any] = {
            "document": np.arange(first, first + documents),
            "tokens": np.full(documents, tokens),
            **columns,
        }
        if "sample" in columns:
            plain["sample_tokens"] = np.full(documents, columns["sample"].shape[1])
            plain["sample"] = columns["sample"].reshape(-1, columns["sample"].shape[-1])
        self._rows.append(LayerStatistics.from_columns(plain))

    def statistics(self, ranks: Ranks = ALONE) -> LayerStatistics:
        """The table of all documents so far, those of other ranks included."""
        return merge(ranks.union(self._rows))


def head_statistics(decoder: Decoder, hidden: Tensor, device: torch.device, ranks: Ranks = ALONE) -> LayerStatistics:
    """Statistics of what enters the head: the hidden states after the decoder's final norm.

    Parameters
    ----------
    decoder : Decoder
    hidden : Tensor, shape (documents, tokens, hidden_size)
        After the last layer.
    device : torch.device
        Where the norm is.
    ranks : Ranks
        Each has hidden states of its own; the table is of all.

    Raises
    ------
    InputError
        If the decoder has no final norm under the name ``norm``.
    NonFiniteError
        If a statistic is NaN or Inf.
    """
    norm = getattr(decoder.body, "norm", None)
    if not isinstance(norm, nn.Module):
        raise InputError("the decoder has no final norm", hint="leave out --nr-prune-lm-head")
    rows = [norm(sequence.to(device)).float().square().mean(0).cpu() for sequence in hidden]
    columns = torch.stack(ranks.union(rows)).numpy()
    if not np.isfinite(columns).all():
        raise NonFiniteError("NaN or Inf in the input of the lm_head", hint="try --dtype float32")
    documents = len(columns)
    return LayerStatistics(np.arange(documents), np.full(documents, hidden.shape[1]), {"lm_head": columns})
