"""The most specialised and the most general neurons, with the passages on which they fire most."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from neuronrank_core import LayerStatistics
from neuronrank_core.statistics.selectivity import by_selectivity
from neuronrank_torch.runs.page.neurons import LayerNeurons
from neuronrank_torch.runs.page.passages import Passages

#: Neurons shown of each kind, at most how many of one layer, and passages for each.
NEURONS, OF_A_LAYER, PASSAGES = 8, 2, 3


def pick(layers: Sequence[LayerNeurons]) -> dict[str, list[dict[str, Any]]]:
    """Choose specialists (highest IDF, then spikiness) and generalists (lowest) among all layers.

    Neurons below the median TF of their layer are skipped, because they rarely fire.

    Returns
    -------
    dict of lists
        Under ``specialists`` and ``generalists``: layer, neuron, ``df``, ``groups``, ``idf``, ``tf``, ``spikiness``.
    """
    layer = np.concatenate([np.full(len(n.tf), i) for i, n in enumerate(layers)])
    neuron = np.concatenate([np.arange(len(n.tf)) for n in layers])
    strong = np.flatnonzero(np.concatenate([n.tf >= np.median(n.tf) for n in layers]))
    idf, spikiness = (np.concatenate([getattr(n, name) for n in layers])[strong] for name in ("idf", "spikiness"))
    order = strong[by_selectivity(idf, spikiness)]

    def describe(rows: Iterable[int]) -> list[dict[str, Any]]:
        taken: Counter[int] = Counter()
        chosen = []
        for row in rows:
            index, j = int(layer[row]), int(neuron[row])
            taken[index] += 1
            if taken[index] <= OF_A_LAYER:
                chosen.append(_describe(layers[index], j))
            if len(chosen) == NEURONS:
                break
        return chosen

    return {"specialists": describe(order), "generalists": describe(order[::-1])}


def _describe(layer: LayerNeurons, neuron: int) -> dict[str, Any]:
    known = {"layer": layer.layer, "neuron": neuron, "df": int(layer.df[neuron]), "groups": layer.groups}
    figures = {name: float(getattr(layer, name)[neuron]) for name in ("tf", "idf", "spikiness")}
    return {**known, **figures, "passages": []}


def add_passages(
    picked: dict[str, list[dict[str, Any]]], table: Callable[[int], LayerStatistics], passages: Passages
) -> None:
    """Add passages to each neuron that was picked. The table of each layer is read once."""
    neurons = [neuron for kind in picked.values() for neuron in kind]
    for layer in sorted({neuron["layer"] for neuron in neurons}):
        read = table(layer)
        signal = read.require("sample", layer)
        for neuron in neurons:
            if neuron["layer"] == layer:
                neuron["passages"] = passages.strongest(read, signal[:, neuron["neuron"]], PASSAGES)
