"""The scores of SPEC's table as plain loops over tokens and weights, with nothing taken from the implementation.

The labels of topics are the one exception: clustering has tests of its own.
"""

from __future__ import annotations

import math

import numpy as np
from layers import Layer

from neuronrank_core import Recipe
from neuronrank_core.statistics.topics import topics

Rows = list[list[float]]
#: weight, input, tf, idf and spikiness exponent where the recipe leaves them open.
EXPONENTS = {
    "neuronrank_wanda": (1.0, 1.0, 0.5, 0.0, 0.0),
    "ria": (1.0, 0.5, 1.0, 1.0, 0.0),
    "dass": (1.0, 0.0, 0.5, 1.0, 0.0),
}
NAMES = ("weight_exp", "input_exp", "tf_exp", "idf_exp", "spikiness_exp")


def exponents(recipe: Recipe) -> list[float]:
    defaults = EXPONENTS.get(recipe.method, (1.0, 0.0, 1.0, 1.0, 0.0))
    given = [getattr(recipe, name) for name in NAMES]
    return [d if g is None else g for d, g in zip(defaults, given, strict=True)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def sampled(layer: Layer, recipe: Recipe) -> tuple[Rows, list[int]]:
    """Signal of the sampled tokens, and the document of each."""
    rows, documents = [], []
    for d, document in enumerate(layer.documents):
        signal = document.signal(recipe.signal).astype(np.float32).tolist()
        kept = min(len(signal), recipe.tokens_per_document)
        rows += [signal[i * len(signal) // kept] for i in range(kept)]
        documents += [d] * kept
    return rows, documents


def tf_and_idf(layer: Layer, recipe: Recipe, j: int) -> tuple[float, float]:
    """Term frequency and inverse document frequency of neuron j."""
    mode = "token" if recipe.method == "neuronrank_old" else recipe.tfidf_mode
    everywhere = [a for d in layer.documents for a in d.signal(recipe.signal)[:, j].tolist()]
    if mode == "token":
        df = sum(g > recipe.threshold for d in layer.documents for g in d.gate[:, j].tolist())
        return mean(everywhere), math.log((len(everywhere) + 1) / (df + 1)) + 1
    rows, labels = sampled(layer, recipe)
    if mode == "topic":
        labels = topics(np.array(rows, np.float32), recipe.tfidf_k, recipe.seed).tolist()
    a = [row[j] for row in rows]
    tau = sorted(a)[math.ceil(recipe.q_active * (len(a) - 1))]
    groups = [[a[t] for t in range(len(a)) if labels[t] == group] for group in sorted(set(labels))]
    df = sum(sum(v >= tau for v in group) / len(group) >= 1 - recipe.q_active - 1e-12 for group in groups)
    tf = mean([mean(group) for group in groups]) if mode == "topic" else mean(everywhere)
    return tf, math.log((len(groups) + 1) / (df + 1)) + 1


def spikiness(layer: Layer, recipe: Recipe, j: int) -> float:
    everywhere = [a for d in layer.documents for a in d.signal(recipe.signal)[:, j].tolist()]
    return max(everywhere) / mean(everywhere)


def variance(layer: Layer, recipe: Recipe, j: int) -> float:
    documents = [d.signal(recipe.signal)[:, j].tolist() for d in layer.documents]
    total = mean([a for document in documents for a in document])
    between = mean([(mean(document) - total) ** 2 for document in documents for _ in document])
    within = mean([(a - mean(document)) ** 2 for document in documents for a in document])
    return between + recipe.token_weight * within


def input_norm(layer: Layer, module: str, k: int) -> float:
    return math.sqrt(
        mean([v * v for d in layer.documents for v in (d.hidden if module == "down_proj" else d.x)[:, k].tolist()])
    )


def neuron_factor(layer: Layer, recipe: Recipe, j: int) -> float:
    """What multiplies every weight of neuron j."""
    _, _, tf_exp, idf_exp, spikiness_exp = exponents(recipe)
    if recipe.method == "neuronrank_unstructured":
        return recipe.magnitude_multi + recipe.variance_multi * variance(layer, recipe, j) ** recipe.variance_exp
    tf, idf = tf_and_idf(layer, recipe, j)
    if recipe.method == "neuronrank_wanda":
        column = [row[j] for row in layer.weights["down_proj"].tolist()]
        tf = input_norm(layer, "down_proj", j) * math.sqrt(sum(w * w for w in column))
    return tf**tf_exp * idf**idf_exp * spikiness(layer, recipe, j) ** spikiness_exp


def score(layer: Layer, recipe: Recipe, module: str) -> Rows:
    """Score of every weight of gate, up or down."""
    method, weight, down = recipe.method, layer.weights[module].tolist(), module == "down_proj"
    weight_exp, input_exp, *_ = exponents(recipe)
    if method in ("magnitude", "wanda"):
        weight_exp, input_exp = 1.0, float(method == "wanda")
    if method == "neuronrank_unstructured":
        input_exp = 0.0
    inputs = range(len(weight[0]))
    norm = [input_norm(layer, module, k) ** input_exp for k in inputs]
    if method == "ria":
        rows, columns = ([sum(map(abs, vector)) for vector in matrix] for matrix in (weight, zip(*weight, strict=True)))
        return [
            [(abs(row[k]) / rows[i] + abs(row[k]) / columns[k]) * norm[k] for k in inputs]
            for i, row in enumerate(weight)
        ]
    if method == "dass":
        tf_exp = exponents(recipe)[2]
        if down:
            return [[abs(row[k]) * input_norm(layer, module, k) for k in inputs] for row in weight]
        return [[abs(w) * input_norm(layer, "down_proj", j) ** tf_exp for w in row] for j, row in enumerate(weight)]
    merit = [[abs(row[k]) ** weight_exp * norm[k] for k in inputs] for row in weight]
    if method in ("magnitude", "wanda") or (method == "neuronrank_wanda" and down):
        return merit
    if method == "neuronrank_wanda":
        merit = [[v / mean(row) for v in row] for row in merit]
    factor = [neuron_factor(layer, recipe, j) for j in (inputs if down else range(len(weight)))]
    return [[v * factor[k if down else i] for k, v in enumerate(row)] for i, row in enumerate(merit)]
