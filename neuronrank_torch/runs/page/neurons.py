"""TF, IDF, spikiness and DF of every neuron, as distributions by layer and as a map of TF against IDF."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuronrank_core import LayerStatistics, NeuronStatistics, Recipe
from neuronrank_core.kernels import Counts, Kernels, Vector

#: Quantiles that summarise a distribution.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
#: Cells of the map along TF and IDF. The size of the drawing does not depend on the number of neurons.
CELLS = (36, 36)


@dataclass(frozen=True)
class LayerNeurons:
    """Statistics of the neurons of one layer; every vector has shape (neurons,)."""

    layer: int
    groups: int
    tf: Vector
    idf: Vector
    spikiness: Vector
    df: Counts


def layer_neurons(layer: int, table: LayerStatistics, recipe: Recipe, kernels: Kernels) -> LayerNeurons:
    """Compute the statistics of the neurons of a layer that the page shows."""
    known = NeuronStatistics(table, recipe, kernels, layer)
    return LayerNeurons(layer, known.groups, known.tf, known.idf, known.spikiness, known.df)


def distributions(layers: Iterable[LayerNeurons]) -> dict[str, list[dict[str, Any]]]:
    """Quantiles of each quantity over the neurons of each layer.

    Returns
    -------
    dict of lists
        Under ``tf``, ``idf``, ``spikiness`` and ``df``, one entry a layer: its number and the :data:`QUANTILES`.
    """
    layers = list(layers)
    return {
        name: [
            {"layer": n.layer, "quantiles": np.quantile(getattr(n, name), QUANTILES).tolist()}  # From exact values.
            for n in layers
        ]
        for name in ("tf", "idf", "spikiness", "df")
    }


def tf_idf_map(layers: Iterable[LayerNeurons]) -> dict[str, Any]:
    """Count the neurons of each layer in cells of TF (in logarithmic steps) and IDF.

    Returns
    -------
    dict
        ``tf`` and ``idf``: edges of the cells, the same for all layers; ``layers``: for each its number, its neurons
        that never fire (which a logarithmic axis cannot show), and its cells that are not empty as
        [cell along TF, cell along IDF, neurons].
    """
    layers = list(layers)
    tf = np.concatenate([n.tf for n in layers])
    edges = _edges(np.log(tf[tf > 0]), CELLS[0]), _level_edges(np.concatenate([n.idf for n in layers]), CELLS[1])
    mapped = []
    for n in layers:
        fires = n.tf > 0
        counts = np.histogram2d(np.log(n.tf[fires]), n.idf[fires], bins=edges)[0].astype(int)
        cells = [[int(i), int(j), int(counts[i, j])] for i, j in np.argwhere(counts)]
        mapped.append({"layer": n.layer, "silent": int((~fires).sum()), "cells": cells})
    return {"tf": np.exp(edges[0]).tolist(), "idf": edges[1].tolist(), "layers": mapped}


def _edges(values: Vector, cells: int) -> Vector:
    """Edges of equal cells that cover all values, also if there is only one value or none."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    return np.linspace(low - 1e-9, max(high, low + 1e-6) + 1e-9, cells + 1)


def _level_edges(values: Vector, cells: int) -> Vector:
    """Edges between the levels of the values, with the same number of levels per cell; equal cells would show stripes.

    If there are too many levels, the cells are equal.
    """
    levels = np.unique(values)
    if not 2 <= len(levels) <= 8 * cells:
        return _edges(values, cells)
    between = (levels[1:] + levels[:-1]) / 2
    inner = between[:: -(-len(levels) // cells)]
    return np.concatenate([[2 * levels[0] - inner[0]], inner, [2 * levels[-1] - inner[-1]]])
