"""The experts of a layer: the topics that each stands for, and the passages at whose tokens it adds most."""

from collections.abc import Collection
from typing import Any

import numpy as np

from neuronrank_core import LayerStatistics, Recipe
from neuronrank_core.kernels import Kernels
from neuronrank_core.statistics.experts import ExpertStatistics
from neuronrank_core.statistics.selectivity import lift, typical_terms
from neuronrank_torch.runs.page.passages import Passages

#: Experts shown for a layer; topics, tokens of a topic and passages shown for an expert; tokens that a topic needs.
EXPERTS, TOPICS, TOKENS, PASSAGES, SIZE = 24, 3, 8, 2, 8


def describe_experts(
    layer: int,
    table: LayerStatistics,
    recipe: Recipe,
    kernels: Kernels,
    passages: Passages | None,
    removed: Collection[int] = (),
) -> dict[str, Any]:
    """Describe the most selective experts of a layer.

    Parameters
    ----------
    layer : int
    table : LayerStatistics
        Of the experts of the layer.
    recipe : Recipe
        In topic mode.
    kernels : Kernels
    passages : Passages, optional
        Without them, topics have no words and experts no passages.
    removed : collection of int
        Experts that the run removed.

    Returns
    -------
    dict
        ``layer``; ``groups``: number of topics that have tokens; ``count``: number of experts; ``experts``: those with
        the highest IDF first, each with its number, ``share`` of the tokens, ``removed``, ``df``, ``idf``, ``tf``, and
        its ``topics`` and ``passages``. A topic has its number, its ``tokens``, the ``lift`` of the expert in it, and
        its most typical ``words``.
    """
    known = ExpertStatistics(table, recipe, kernels, layer)
    size = np.bincount(known.labels, minlength=known.groups)
    lifts = np.where(size[:, None] < SIZE, 0, lift(known.group_means))
    words = passages.sampled_tokens(table) if passages else None
    typical = typical_terms(words, known.labels, known.groups, TOKENS) if words else [[]] * known.groups
    order = np.lexsort((-known.frequency, -known.idf))[:EXPERTS]
    experts = [
        {
            "expert": int(expert),
            "share": float(known.frequency[expert]),
            "removed": int(expert) in removed,
            "df": int(known.df[expert]),
            **{name: float(getattr(known, name)[expert]) for name in ("idf", "tf")},
            "topics": [
                {"topic": topic, "tokens": int(size[topic]), "lift": float(by_topic[topic]), "words": typical[topic]}
                for topic in np.argsort(-by_topic, kind="stable")[:TOPICS].tolist()
                if by_topic[topic] > 1
            ],
            "passages": passages.strongest(table, known.signal[:, expert], PASSAGES) if passages else [],
        }
        for expert, by_topic in zip(order, lifts.T[order], strict=True)
    ]
    return {"layer": layer, "groups": known.groups, "count": len(known.idf), "experts": experts}
