"""Reduces what the experts of a mixture add to rows of statistics, with hooks on the module that runs them."""

from typing import Any

import torch
from torch import Tensor

from neuronrank_core import MissingStatisticsError, NonFiniteError, Recipe
from neuronrank_core.methods import requires
from neuronrank_core.statistics.table import SAMPLE, LayerStatistics, merge, sample_positions
from neuronrank_torch import kernels
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.model.mixture import Mixture


class ExpertTableBuilder:
    """Rows of the experts of a layer, as :class:`neuronrank_torch.calibration.collector.LayerCollector` collects them.

    Parameters
    ----------
    block : Mixture
    recipe : Recipe
        Determines the required statistics.
    seqlen : int
        Length of each document: the experts read all tokens of a micro-batch in one row.
    """

    expert = None

    def __init__(self, block: Mixture, recipe: Recipe, seqlen: int) -> None:
        self.block, self.recipe, self.seqlen = block, recipe, seqlen
        self.kinds = requires(recipe)
        self._rows: list[LayerStatistics] = []
        self._batch: dict[str, Tensor] = {}

    def watch(self) -> list[Any]:
        """Install the hooks."""
        assert self.block.fused is not None
        return self.block.fused.on_contributions(self._see) if self.kinds else []

    def _see(self, inputs: Tensor, routed: Tensor, gate: Tensor, norm: Tensor) -> None:
        x, routed, gate, norm = (t.view(-1, self.seqlen, t.shape[-1]) for t in (inputs, routed, gate, norm))
        self._batch = kernels.expert_sums(routed, gate, norm)
        if SAMPLE in self.kinds:
            kept = torch.as_tensor(sample_positions(self.seqlen, self.recipe.tokens_per_document), device=x.device)
            sampled = {"sample": x, "sample_gate": gate, "sample_norm": norm}
            self._batch |= {name: values[:, kept].float().flatten(0, 1) for name, values in sampled.items()}

    def add_rows(self, first: int, tokens: int) -> None:
        """Convert what was reduced since the last call into rows."""
        if not self._batch:
            raise MissingStatisticsError(self.block.where, f"{type(self.block.module).__name__} was not called")
        columns: dict[str, Any] = {name: column.cpu().numpy() for name, column in self._batch.items()}
        self._batch = {}
        if not all(torch.as_tensor(column).isfinite().all() for column in columns.values()):
            raise NonFiniteError(
                f"NaN or Inf in the experts of layer {self.block.where}",
                hint="check the model's weights, or try --dtype float32",
            )
        documents = len(columns["expert_tokens"])
        numbers = torch.arange(first, first + documents).numpy()
        columns |= {"document": numbers, "tokens": numbers * 0 + tokens}
        if "sample" in columns:
            columns["sample_tokens"] = numbers * 0 + len(columns["sample"]) // documents
        self._rows.append(LayerStatistics.from_columns(columns))

    def table(self, ranks: Ranks) -> LayerStatistics | None:
        """The table of all documents of all ranks; None if the method needs none."""
        rows = ranks.union(self._rows) if self.kinds else []
        return merge(rows) if rows else None
