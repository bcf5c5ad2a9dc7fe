"""A pass through the dense model that determines the sparsity ratio of each layer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuronrank_core import LayerStatistics, Recipe, ScoringContext
from neuronrank_core.selection.allocation import (
    allocate,
    error_histogram,
    harmless,
    typical_gain,
    typical_square_norm,
)
from neuronrank_core.selection.masks import target_zeros
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.error_gain import error_gains
from neuronrank_torch.calibration.hidden_states import residual_norm
from neuronrank_torch.calibration.layerwise import LayerRun
from neuronrank_torch.calibration.routed import SquaredFactors
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
        gains = [typical_gain(column, run.index) for column in error_gains(run, run.layer.mlps, self.ranks).T]
        squares = SquaredFactors(run.layer.experts)
        with LayerCollector(run.layer, run.layer.mlps, self.statistics, run.hidden.shape[1]) as collector, squares:
            run.feed(keep=True, after=lambda start: collector.add_documents(start, run.hidden.shape[1]))
        tables = collector.statistics(self.ranks)
        self.count(run.layer, tables, residual_norm(run.hidden, self.ranks), gains, squares.mean(self.ranks))

    def count(
        self,
        layer: Layer,
        tables: Sequence[LayerStatistics | None],
        residual: NDArray[Any],
        gains: Sequence[float],
        factors: Sequence[float] = (),
    ) -> None:
        """Count the weights of a dense layer by removal error, computed from its statistics.

        Parameters
        ----------
        layer : Layer
            Layers must be given in order.
        tables : sequence of LayerStatistics
            Of each MLP, with mean squares of the inputs; None for an expert without tokens, whose weights cause no
            error.
        residual : array, shape (documents, tokens)
            Norms of the residual stream.
        gains : sequence of float
            Of each MLP, how much larger the square of an error of its output is in the layer's output.
        factors : sequence of float
            For each expert, the mean over all tokens of the square of its factor, by which errors of its output count.
        """
        typical, counts = typical_square_norm(residual), harmless(0)
        for mlp, table, gain in zip(layer.mlps, tables, gains, strict=True):
            factor = gain * (1.0 if mlp.expert is None else factors[mlp.expert])
            if table is None or factor == 0:
                counts += harmless(sum(weight.numel() for weight in mlp.weights.values()))
            else:
                weights = {role: weight.float() for role, weight in mlp.weights.items()}
                context = ScoringContext(mlp.where, self.statistics, weights, table, self.kernels)
                counts += error_histogram(context, typical / factor)
        self.histograms.append(counts)

    def ratios(self) -> list[float]:
        """Sparsity ratio of each layer."""
        shapes = [
            [(role, (w.shape[0], w.shape[1]), mlp.gated) for mlp in layer.mlps for role, w in mlp.weights.items()]
            for layer in self.layers
        ]

        def zeros(layer: int, ratio: float) -> int:
            return sum(target_zeros(role, s, self.recipe, ratio, gated=gated) for role, s, gated in shapes[layer])

        return allocate(self.histograms, self.recipe.ratio, zeros)
