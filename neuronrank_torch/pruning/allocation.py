"""The pass through the dense model that tells how much each layer can give up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from neuronrank_core import LayerStatistics, Recipe, ScoringContext
from neuronrank_core.selection.allocation import allocate, error_histogram, typical_square_norm
from neuronrank_core.selection.masks import target_zeros
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.hidden_states import residual_norm
from neuronrank_torch.calibration.layerwise import LayerRun
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.structure import Decoder, activation_of, prunable_linears


class AllocationPass:
    """Visits the dense layers in order, for :func:`neuronrank_torch.calibration.layerwise.run_layers`.

    Parameters
    ----------
    decoder : Decoder
    recipe : Recipe
    kernels : TorchKernels
    first : int
        First layer that is pruned.
    on_batch : callable
        Called with the layer's number after each micro-batch.
    ranks : Ranks
        Who shares the text.
    """

    def __init__(
        self,
        decoder: Decoder,
        recipe: Recipe,
        kernels: TorchKernels,
        first: int,
        on_batch: Callable[[int], None],
        ranks: Ranks,
    ) -> None:
        # The error of a removal needs what Wanda needs, whatever the method.
        self.recipe, self.statistics = recipe, replace(recipe, method="wanda", include_attention=False)
        self.decoder, self.kernels, self.first, self.on_batch, self.ranks = decoder, kernels, first, on_batch, ranks
        self.histograms: list[NDArray[np.int64]] = []

    def visit(self, run: LayerRun) -> None:
        """Run a dense layer, and count its weights by the error that their removal causes."""
        if run.index < self.first:
            run.feed(keep=True, after=lambda start: self.on_batch(run.index))
            return
        linears = prunable_linears(run.layer, run.index)
        collector = LayerCollector(run.index, linears, activation_of(run.layer, run.index), self.statistics)

        def batch_done(start: int) -> None:
            collector.add_documents(start, run.hidden.shape[1])
            self.on_batch(run.index)

        with collector:
            run.feed(keep=True, after=batch_done)
        table = collector.statistics(self.ranks)
        self.count(run.index, linears, replace(table, residual_norm=residual_norm(run.hidden, self.ranks)))

    def count(self, index: int, linears: dict[str, nn.Linear], table: LayerStatistics) -> None:
        """Count the weights of a dense layer by the error that their removal causes, by its statistics.

        Parameters
        ----------
        index : int
            The layer's number; layers come in order, from ``first`` on.
        linears : dict of nn.Linear
            Of the MLP.
        table : LayerStatistics
            With mean squares of the inputs and norms of the residual stream.
        """
        weights = {name: linear.weight.float() for name, linear in linears.items()}
        context = ScoringContext(index, self.statistics, weights, table, self.kernels)
        self.histograms.append(error_histogram(context, typical_square_norm(table.require("residual_norm", index))))

    def ratios(self) -> list[float]:
        """Sparsity ratio of each layer from ``first`` on."""
        shapes = [
            {name: (linear.out_features, linear.in_features) for name, linear in prunable_linears(layer, index).items()}
            for index, layer in enumerate(self.decoder.layers)
        ]

        def zeros(layer: int, ratio: float) -> int:
            modules = shapes[self.first + layer].items()
            return sum(target_zeros(name, shape, self.recipe, ratio) for name, shape in modules)

        return allocate(self.histograms, self.recipe.ratio, zeros)
