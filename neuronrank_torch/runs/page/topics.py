"""The topics of a layer: their most typical tokens, and the neurons that fire most selectively in each."""

from typing import Any

import numpy as np

from neuronrank_core import LayerStatistics, NeuronStatistics, Recipe
from neuronrank_core.kernels import Kernels
from neuronrank_core.statistics.selectivity import lift, typical_terms

#: Topics shown for a layer, tokens and neurons shown for a topic.
TOPICS, TOKENS, NEURONS = 12, 8, 4


def describe_topics(
    layer: int, table: LayerStatistics, recipe: Recipe, kernels: Kernels, words: list[str] | None
) -> dict[str, Any]:
    """Describe the largest topics of a layer.

    Parameters
    ----------
    layer : int
    table : LayerStatistics
    recipe : Recipe
        In topic mode.
    kernels : Kernels
    words : list of str, optional
        Of each sampled token; without them the topics have no words.

    Returns
    -------
    dict
        ``layer``; ``groups``: number of topics that have tokens; ``tokens``: sampled tokens in all; ``topics``: the
        largest of them, each with its number, tokens, words and neurons with their lift.
    """
    known = NeuronStatistics(table, recipe, kernels, layer)
    size = np.bincount(known.labels, minlength=known.groups)
    lifts = lift(kernels.group_means(table.require("sample", layer), known.labels, known.groups))  # type: ignore[arg-type]
    typical = typical_terms(words, known.labels, known.groups, TOKENS) if words else None
    topics = []
    for topic in np.argsort(-size, kind="stable")[:TOPICS]:
        neurons = np.argsort(-lifts[topic], kind="stable")[:NEURONS]
        topics.append(
            {
                "topic": int(topic),
                "tokens": int(size[topic]),
                "words": typical[topic] if typical else [],
                "neurons": [{"neuron": int(j), "lift": float(lifts[topic, j])} for j in neurons],
            }
        )
    return {"layer": layer, "groups": known.groups, "tokens": int(size.sum()), "topics": topics}
