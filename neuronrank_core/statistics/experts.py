"""Experts of a mixture as terms: what a document's row holds of them, and frequency, REAP, TF, DF and IDF."""

from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neuronrank_core.errors import InvalidValueError, NonFiniteError
from neuronrank_core.kernels import Counts, Vector
from neuronrank_core.recipe import TOKENS_PER_DOCUMENT
from neuronrank_core.statistics import tfidf
from neuronrank_core.statistics.neurons import NeuronStatistics
from neuronrank_core.statistics.table import LayerStatistics, sample_positions

#: The column that holds the sum of each signal, by the names of :data:`neuronrank_core.recipe.SIGNALS`.
SUMS = {"gate": "expert_gate", "activated": "expert_norm", "product": "expert_gated_norm"}


def expert_sums(routed: ArrayLike, gate: ArrayLike, norm: ArrayLike) -> dict[str, NDArray[np.generic]]:
    """Sums over the tokens of a document, each of shape (experts,), by the name of their column.

    Parameters
    ----------
    routed : bool array, shape (tokens, experts)
        Whether the router sends the token to the expert.
    gate : array, shape (tokens, experts)
        Factor by which the model multiplies the output of the expert; zero where the token is not routed to it.
    norm : array, shape (tokens, experts)
        Euclidean norm of that output, before the factor; zero where the token is not routed to it.
    """
    gate, norm = np.asarray(gate, dtype=np.float64), np.asarray(norm, dtype=np.float64)
    return {
        "expert_tokens": np.sum(np.asarray(routed, dtype=bool), axis=0, dtype=np.int64),
        "expert_gate": gate.sum(axis=0),
        "expert_norm": norm.sum(axis=0),
        "expert_gated_norm": (gate * norm).sum(axis=0),
    }


def expert_statistics(
    document: int,
    routed: ArrayLike,
    gate: ArrayLike,
    norm: ArrayLike,
    inputs: ArrayLike,
    *,
    tokens_per_document: int = TOKENS_PER_DOCUMENT,
    layer: int | str = "?",
) -> LayerStatistics:
    """Compute the row of one document from what the experts of a layer do at its tokens.

    Parameters
    ----------
    document : int
        Identifier of the document.
    routed, gate, norm
        See :func:`expert_sums`.
    inputs : array, shape (tokens, features)
        What the router and the experts read.
    tokens_per_document : int
        Maximum number of tokens to sample.
    layer : int or str
        Used in error messages.

    Returns
    -------
    LayerStatistics
        A table with one row.

    Raises
    ------
    NonFiniteError
        If a value is NaN or Inf.
    InvalidValueError
        If the arrays differ in their numbers of tokens.
    """
    x = np.asarray(inputs, dtype=np.float64)
    lengths = [len(np.asarray(values)) for values in (x, routed, gate, norm)]
    if len(set(lengths)) > 1:
        raise InvalidValueError("tokens", lengths, "one number for all arrays")
    sums = expert_sums(routed, gate, norm)
    if not np.isfinite(x).all() or not all(np.isfinite(column).all() for column in sums.values()):
        raise NonFiniteError(f"NaN or Inf in the experts of layer {layer}", hint="check the model's weights")
    kept = sample_positions(len(x), tokens_per_document)
    sampled = {"sample": x, "sample_gate": gate, "sample_norm": norm}
    columns = {
        "document": np.array([document], dtype=np.int64),
        "tokens": np.array([len(x)], dtype=np.int64),
        **{
            name: column[None].astype(np.int64 if name == "expert_tokens" else np.float32)
            for name, column in sums.items()
        },
        **{name: np.asarray(values)[kept].astype(np.float32) for name, values in sampled.items()},
        "sample_tokens": np.array([len(kept)], dtype=np.int64),
    }
    return LayerStatistics.from_columns(columns)


def active_documents(expert_tokens: ArrayLike) -> NDArray[np.bool_]:
    """Whether each expert is active in each document, shape (documents, experts).

    It is if its share of the document's routed tokens is at least its share of those of all documents together.
    """
    counts = np.asarray(expert_tokens, dtype=np.int64)
    # a / b >= c / d as a * d >= c * b: exact in integers.
    return np.asarray(counts * counts.sum() >= counts.sum(axis=0) * counts.sum(axis=1, keepdims=True))


class ExpertStatistics(NeuronStatistics):
    """Statistics of each expert over the corpus; every vector has shape (experts,).

    A token is routed to several experts, and all of a document's, topic's or corpus's tokens are counted once for each
    of them. Parameters as for :class:`neuronrank_core.NeuronStatistics`; ``signal`` chooses what TF sums: the gate
    (``gate``), the norm of the expert's output (``activated``) or their product (``product``).
    """

    @cached_property
    def counts(self) -> Counts:
        """Number of tokens that are routed to each expert."""
        return np.asarray(self._column("expert_tokens").sum(axis=0), dtype=np.int64)

    @cached_property
    def frequency(self) -> Vector:
        """Share of the tokens that are routed to each expert."""
        return self.counts / float(self.table.tokens.sum())

    @cached_property
    def reap(self) -> Vector:
        """Mean, over the tokens that are routed to it, of gate times norm of the output; 0 without tokens."""
        return np.asarray(self._sum("product") / np.maximum(self.counts, 1))

    @cached_property
    def contribution(self) -> Vector:
        """Gate times norm of the output: mean over all tokens, or over topics of the mean over their sampled tokens.

        Over all tokens it is :attr:`frequency` times :attr:`reap`.
        """
        if self.mode == "topic":
            return tfidf.topic_term_frequency(self._group_means("product"))
        return self._sum("product") / float(self.table.tokens.sum())

    def _sum(self, signal: str) -> Vector:
        return np.asarray(np.add.reduce(self._column(SUMS[signal]).astype(np.float64), axis=0))

    @cached_property
    def mean(self) -> Vector:
        """Mean signal over all tokens, exact."""
        return self._sum(self.recipe.signal) / float(self.table.tokens.sum())

    @cached_property
    def tf(self) -> Vector:
        """Term frequency: the mean signal over all tokens, or over topics of the mean over their sampled tokens."""
        return tfidf.topic_term_frequency(self.group_means) if self.mode == "topic" else self.mean

    @cached_property
    def signal(self) -> NDArray[np.generic]:
        """Signal of each expert at the sampled tokens, shape (sampled tokens, experts)."""
        return self._sampled(self.recipe.signal)

    @cached_property
    def group_means(self) -> Vector:
        """Mean signal of each group's sampled tokens, shape (groups, experts)."""
        return self._group_means(self.recipe.signal)

    def _sampled(self, signal: str) -> NDArray[np.generic]:
        gate, norm = self._column("sample_gate"), self._column("sample_norm")
        return {"gate": gate, "activated": norm, "product": gate * norm}[signal]  # type: ignore[operator]

    def _group_means(self, signal: str) -> Vector:
        return np.asarray(self.kernels.group_means(self._sampled(signal), self.labels, self.groups))  # type: ignore[arg-type]

    @cached_property
    def groups(self) -> int:
        """Number of groups: documents, non-empty topics, or tokens."""
        return len(self.table.document) if self.mode == "doc" else super().groups

    @cached_property
    def df(self) -> Counts:
        """Document frequency: the number of groups in which the expert is active, or of tokens routed to it."""
        if self.mode == "token":
            return self.counts
        counts = self._column("expert_tokens")
        if self.mode == "topic":
            routed = (self._column("sample_gate") != 0) | (self._column("sample_norm") != 0)
            counts = tfidf.group_sums(routed, self.labels, self.groups, np.int64)
        return np.asarray(active_documents(counts).sum(axis=0), dtype=np.int64)
