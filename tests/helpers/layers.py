"""Small random gated MLPs with the activations of a ragged corpus, and the table a collector makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from neuronrank_core import LayerStatistics, Recipe, ScoringContext, document_statistics, merge

Matrix = NDArray[np.float64]
MODULES = ("gate_proj", "up_proj", "down_proj")

#: Lengths of the documents of a corpus: ragged, some shorter and some longer than the tokens sampled of each.
ragged = st.lists(st.integers(1, 12), min_size=1, max_size=6)
seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Document:
    """What a layer sees and says at each token of a document."""

    x: Matrix
    gate: Matrix
    up: Matrix

    @property
    def activated(self) -> Matrix:
        """SiLU of the gate."""
        return self.gate / (1 + np.exp(-self.gate))

    @property
    def hidden(self) -> Matrix:
        """Input of down."""
        return self.activated * self.up

    def signal(self, kind: str) -> Matrix:
        """Magnitude of each neuron's activation."""
        return abs({"gate": self.gate, "activated": self.activated, "product": self.hidden}[kind])


@dataclass(frozen=True)
class Layer:
    """Weights by module, and documents."""

    weights: dict[str, Matrix]
    documents: list[Document]

    def collect(self, recipe: Recipe) -> LayerStatistics:
        """The table of this layer, with every column."""
        return merge(
            document_statistics(
                i,
                signal=d.signal(recipe.signal),
                gate=d.gate,
                inputs={"gate_proj": d.x, "down_proj": d.hidden, "q_proj": d.x},
                threshold=recipe.threshold,
                tokens_per_document=recipe.tokens_per_document,
            )
            for i, d in enumerate(self.documents)
        )

    def context(self, recipe: Recipe, table: LayerStatistics | None = None) -> ScoringContext:
        """The layer under a recipe."""
        return ScoringContext(3, recipe, self.weights, table or self.collect(recipe))


def random_layer(
    seed: int = 0, *, neurons: int = 7, features: int = 8, lengths: Sequence[int] = (5, 11, 2, 8)
) -> Layer:
    """A layer whose documents differ from each other, so that neurons are selective."""
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(size=(neurons, features)) for name in ("gate_proj", "up_proj")}
    weights["down_proj"] = rng.normal(size=(features, neurons))
    documents = []
    for length in lengths:
        x = rng.normal(size=(length, features)) + 2 * rng.normal(size=features)
        documents.append(Document(x, x @ weights["gate_proj"].T, x @ weights["up_proj"].T))
    return Layer(weights | {"q_proj": rng.normal(size=(features, features))}, documents)


def random_row(rng: np.random.Generator, document: int, tokens: int, **options: int) -> LayerStatistics:
    """A row of the table; whole-numbered signals, so that ties and dead neurons are common."""
    gate = rng.integers(-3, 4, size=(tokens, 5)).astype(np.float32)
    inputs = {"gate_proj": rng.normal(size=(tokens, 4)).astype(np.float32)}
    return document_statistics(document, signal=abs(gate), gate=gate, inputs=inputs, **options)


def same_bits(one: LayerStatistics, other: LayerStatistics) -> bool:
    """Whether two tables hold the same columns, types, shapes and bits."""
    a, b = one.columns(), other.columns()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )
