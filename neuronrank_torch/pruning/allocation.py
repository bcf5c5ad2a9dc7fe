"""A pass through the dense model that determines the sparsity ratio of each layer."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from neuronrank_core import LayerStatistics, Recipe, ScoringContext
from neuronrank_core.selection.allocation import allocate, error_histogram, typical_square_norm
from neuronrank_core.selection.masks import target_zeros
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.hidden_states import residual_norm
from neuronrank_torch.calibration.layerwise import LayerRun
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.structure import Layer


class AllocationPass:
    """Visits the dense layers in order, for :func:`neuronrank_torch.calibration.layerwise.run_layers`.

    Parameters
    ----------
    layers : sequence of Layer
        The layers to prune.
    recipe : Recipe
    kernels : TorchKernels
    ranks : Ranks
        Processes that share the text.
    """

    def __init__(self, layers: Sequence[Layer], recipe: Recipe, kernels: TorchKernels, ranks: Ranks) -> None:
        # The removal error needs the statistics of Wanda, regardless of the method.
        self.recipe, self.statistics = recipe, replace(recipe, method="wanda", include_attention=False)
        self.layers, self.kernels, self.ranks = layers, kernels, ranks
        self.histograms: list[NDArray[np.int64]] = []

    def visit(self, run: LayerRun) -> None:
        """Run a dense layer and count its weights by removal error."""
        if run.layer not in self.layers:
            run.feed(keep=True)
            return
        with LayerCollector(run.layer, [run.layer.mlp], self.statistics, run.hidden.shape[1]) as collector:
            run.feed(keep=True, after=lambda start: collector.add_documents(start, run.hidden.shape[1]))
        [table] = collector.statistics(self.ranks)
        if table is not None:
            self.count(run.layer, replace(table, residual_norm=residual_norm(run.hidden, self.ranks)))

    def count(self, layer: Layer, table: LayerStatistics) -> None:
        """Count the weights of a dense layer by removal error, computed from its statistics.

        Parameters
        ----------
        layer : Layer
            Layers must be given in order.
        table : LayerStatistics
            With mean squares of the inputs and norms of the residual stream.
        """
        weights = {role: weight.float() for role, weight in layer.mlp.weights.items()}
        context = ScoringContext(layer.index, self.statistics, weights, table, self.kernels)
        typical = typical_square_norm(table.require("residual_norm", layer.index))
        self.histograms.append(error_histogram(context, typical))

    def ratios(self) -> list[float]:
        """Sparsity ratio of each layer."""
        shapes = [{role: tuple(w.shape) for role, w in layer.mlp.weights.items()} for layer in self.layers]

        def zeros(layer: int, ratio: float) -> int:
            return sum(target_zeros(role, (s[0], s[1]), self.recipe, ratio) for role, s in shapes[layer].items())

        return allocate(self.histograms, self.recipe.ratio, zeros)
