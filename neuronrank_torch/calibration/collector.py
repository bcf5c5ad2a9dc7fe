"""Collects the statistics of one layer with hooks: one table per block, with one row per document."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuronrank_core import MissingStatisticsError, NonFiniteError, Recipe
from neuronrank_core.methods import METHODS, method_of, requires
from neuronrank_core.statistics.table import (
    INPUTS,
    SAMPLE,
    SIGNAL,
    LayerStatistics,
    merge,
    sample_positions,
)
from neuronrank_torch import kernels
from neuronrank_torch.calibration.expert_rows import ExpertTableBuilder
from neuronrank_torch.calibration.layerwise import Others, layers_done
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.model.blocks import Block, Mlp, Projection, by_input
from neuronrank_torch.model.early_stop import StopForward, captured
from neuronrank_torch.model.mixture import Mixture
from neuronrank_torch.model.structure import Decoder, Layer


class LayerCollector(ExitStack):
    """Collects statistics while micro-batches of equally long documents without padding run through a layer.

    A context manager: the hooks are installed only inside it. They reduce activations while these are still in the
    cache, and keep only the resulting rows.

    A module computes all of its experts at once, so a single expert cannot be hooked. Gate and up of each expert are
    therefore computed again from the tokens routed to it. If nothing else is collected and the layer's output is not
    needed, the forward pass ends before the module computes its own.

    Parameters
    ----------
    layer : Layer
    blocks : sequence of Block
        Blocks of that layer; a table is collected for each.
    recipe : Recipe
        Determines the required statistics and their signal.
    seqlen : int
        Length of each document, for layers that pass their shared expert the tokens of all documents in one row.
    output_needed : bool
        Whether the forward pass has to reach the layer's output.
    """

    def __init__(
        self, layer: Layer, blocks: Sequence[Block], recipe: Recipe, seqlen: int = 1, *, output_needed: bool = True
    ) -> None:
        super().__init__()
        self.layer = layer
        self._builders: list[_TableBuilder | ExpertTableBuilder] = [
            ExpertTableBuilder(block, recipe, seqlen)
            if isinstance(block, Mixture)
            else _TableBuilder(block, recipe, seqlen)
            for block in blocks
        ]
        self._routed: tuple[Tensor, Tensor] | None = None
        self._stops = not output_needed and all(builder.expert is not None for builder in self._builders)

    def __enter__(self) -> LayerCollector:
        hooks = [hook for builder in self._builders if builder.expert is None for hook in builder.watch()]
        if self.layer.experts is not None and any(builder.expert is not None for builder in self._builders):
            hooks.append(self.layer.experts.on_routed(self._see_routed))
        for hook in hooks:
            self.callback(hook.remove)
        return self

    def _see_routed(self, inputs: Tensor, hits: Tensor) -> None:
        self._routed = inputs, hits
        if self._stops:
            raise StopForward

    def add_documents(self, first: int, tokens: int) -> None:
        """Convert what the hooks reduced since the last call into rows.

        Parameters
        ----------
        first : int
            Index of the first document of the micro-batch; the others follow.
        tokens : int
            Length of each document.

        Raises
        ------
        MissingStatisticsError
            If the layer did not call its experts.
        NonFiniteError
            If a statistic is NaN or Inf.
        """
        for builder in self._builders:
            if not builder.kinds:
                continue
            if isinstance(builder, ExpertTableBuilder) or builder.expert is None:
                builder.add_rows(first, tokens)
                continue
            if self._routed is None or self.layer.experts is None:
                raise MissingStatisticsError(self.layer.index, f"{type(builder.block.module).__name__} was not called")
            inputs, hits = (of[builder.expert] for of in self._routed)
            counts = hits.view(-1, tokens).sum(1).cpu().tolist()
            x = inputs[hits]
            seen = [torch.split(of, counts) for of in (x, *self.layer.experts.activations(builder.expert, x))]
            for document, (count, *parts) in enumerate(zip(counts, *seen, strict=True)):
                if count:
                    builder.see(*(part[None] for part in parts))
                    builder.add_rows(first + document, count)
        self._routed = None

    def statistics(self, ranks: Ranks = ALONE) -> list[LayerStatistics | None]:
        """The table of each block, with the documents of all ranks.

        None for a block that needs no statistics, or an expert that received no tokens.
        """
        return [builder.table(ranks) for builder in self._builders]


class _TableBuilder:
    """Reduces the activations of one block to rows."""

    def __init__(self, block: Block, recipe: Recipe, seqlen: int) -> None:
        self.block, self.recipe, self.seqlen = block, recipe, seqlen
        self.expert = block.expert if isinstance(block, Mlp) else None
        method = method_of(recipe)
        self.kinds = (method if isinstance(block, Mlp) else METHODS[method.beyond_mlp]).requires(recipe)
        if recipe.removes_heads:
            self.kinds = requires(recipe)
        self.signal = block.signal(recipe.signal)
        self._rows: list[LayerStatistics] = []
        self._batch: dict[str, Tensor] = {}

    def watch(self) -> list[Any]:
        """Install hooks that reduce the activations of the block's modules."""
        hooks = []
        for role, projection in by_input(self.block.projections).items():
            if INPUTS in self.kinds:
                hooks.append(projection.on_input(lambda x, role=role: self.see_input(role, x)))  # type: ignore[misc]
        if self.recipe.removes_heads and self.kinds:
            hooks.append(self.block.projections["o_proj"].on_input(self.see_heads))
        elif self.kinds & {SIGNAL, SAMPLE}:
            gate = self.block.projections["gate_proj" if self.block.gated else "up_proj"]
            hooks += [gate.on_output(self.see_gate), self.block.projections["down_proj"].on_input(self.see_product)]
        return hooks

    def see(self, x: Tensor, gate: Tensor, product: Tensor) -> None:
        """Reduce the activations of an expert on its tokens, each of shape (1, tokens, features)."""
        if INPUTS in self.kinds:
            self.see_input("gate_proj", x)
            self.see_input("down_proj", product)
        if self.kinds & {SIGNAL, SAMPLE}:
            self.see_gate(gate)
            self.see_product(product)

    def _by_document(self, x: Tensor) -> Tensor:
        return x if x.ndim > 2 else x.view(-1, self.seqlen, x.shape[-1])

    def see_input(self, role: str, x: Tensor) -> None:
        """Reduce the input of a projection, shape (documents, tokens, in_features)."""
        self._batch[f"input_mean_square.{role}"] = kernels.mean_square(self._by_document(x))

    def see_gate(self, gate: Tensor) -> None:
        """Reduce the output of the gate (of ``up_proj`` in a plain MLP), shape (documents, tokens, neurons)."""
        gate = self._by_document(gate)
        if SIGNAL in self.kinds:
            self._batch["open_gate"] = kernels.open_gates(gate, self.recipe.threshold)
        if self.signal != "product":
            activation = self.block.activation if self.signal == "activated" else None  # type: ignore[attr-defined]
            self._see_signal(gate if activation is None else activation(gate))

    def see_product(self, product: Tensor) -> None:
        """Reduce the input of ``down_proj``, shape (documents, tokens, neurons)."""
        if self.signal == "product":
            self._see_signal(self._by_document(product))

    def see_heads(self, x: Tensor) -> None:
        """Reduce the input of ``o_proj``, shape (documents, tokens, heads * head_dim)."""
        signal = kernels.head_signal(self._by_document(x), self.block.weights["o_proj"], self.block.heads or 1)
        if SIGNAL in self.kinds:
            self._batch["open_gate"] = kernels.open_gates(signal, self.recipe.threshold)
        self._see_signal(signal)

    def _see_signal(self, activation: Tensor) -> None:
        if SAMPLE in self.kinds:
            kept = sample_positions(activation.shape[1], self.recipe.tokens_per_document)
            self._batch["sample"] = activation[:, torch.as_tensor(kept, device=activation.device)].abs().float()
        if SIGNAL in self.kinds:
            mean, square, peak = kernels.signal_moments(activation)
            self._batch |= {"signal_mean": mean, "signal_mean_square": square, "signal_max": peak}
        elif not activation.sum(dtype=torch.float32).isfinite():
            # No moments to check, and the sample holds only some tokens. One sum is cheaper than an elementwise test.
            raise self._non_finite("signal")

    def _non_finite(self, name: str) -> NonFiniteError:
        return NonFiniteError(
            f"NaN or Inf in {name} of layer {self.block.where}",
            hint="check the model's weights, or try --dtype float32",
        )

    def add_rows(self, first: int, tokens: int) -> None:
        """Convert what was reduced since the last call into rows; see :meth:`LayerCollector.add_documents`."""
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

    def table(self, ranks: Ranks) -> LayerStatistics | None:
        """The table of all documents of all ranks; None if there are no rows."""
        rows = ranks.union(self._rows) if self.kinds else []
        return merge(rows) if rows else None


def head_statistics(
    model: nn.Module,
    decoder: Decoder,
    hidden: Tensor,
    sequences: Tensor,
    *,
    others: Others = None,
    ranks: Ranks = ALONE,
) -> LayerStatistics:
    """Statistics of the head's input, as the model's own forward passes it to the head.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    decoder : Decoder
    hidden : Tensor, shape (documents, tokens, hidden_size)
        Hidden states after the last layer.
    sequences : int64 Tensor, shape (documents, tokens)
        Their tokens.
    others : tuple, optional
        :attr:`~neuronrank_torch.calibration.layerwise.LayerRun.others` of the last layer.
    ranks : Ranks
        Each rank has its own hidden states; the table covers all.

    Raises
    ------
    NonFiniteError
        If a statistic is NaN or Inf.
    """
    head, rows = Projection(model.get_output_embeddings()), []  # type: ignore[operator]
    with layers_done(decoder, hidden, others):
        for sequence in sequences:
            x = captured(head.on_input, partial(model, input_ids=sequence[None], use_cache=False))
            rows.append(x[0].float().square().mean(0).cpu())
    columns = torch.stack(ranks.union(rows)).numpy()
    if not np.isfinite(columns).all():
        raise NonFiniteError("NaN or Inf in the input of the lm_head", hint="try --dtype float32")
    documents = len(columns)
    return LayerStatistics(np.arange(documents), np.full(documents, hidden.shape[1]), {"lm_head": columns})
