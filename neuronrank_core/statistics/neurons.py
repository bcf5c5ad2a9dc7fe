"""TF, DF, IDF and spikiness of one layer's neurons, each computed on first access."""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neuronrank_core.kernels import Counts, Kernels, Vector
from neuronrank_core.recipe import Recipe
from neuronrank_core.statistics import tfidf
from neuronrank_core.statistics.numpy_kernels import NumpyKernels
from neuronrank_core.statistics.table import LayerStatistics


class NeuronStatistics:
    """Statistics of each neuron over the corpus; every vector has shape (neurons,).

    Parameters
    ----------
    table : LayerStatistics
    recipe : Recipe
        Uses ``tfidf_k``, ``q_active``, ``seed`` and ``token_weight``.
    kernels : Kernels
        Backend for operations over sampled tokens.
    layer : int or str
        Used in error messages.
    labels : int64 array, shape (sampled tokens,), optional
        Group of each sampled token, in [0, groups), no group empty. By default its document (doc mode) or its topic
        found by clustering (topic mode).
    mode : {"doc", "topic", "token"}, optional
        How groups are formed; the recipe's ``tfidf_mode`` by default.

    Raises
    ------
    MissingStatisticsError
        On access, if the table lacks a column.
    """

    def __init__(
        self,
        table: LayerStatistics,
        recipe: Recipe,
        kernels: Kernels | None = None,
        layer: int | str = "?",
        labels: NDArray[np.int64] | None = None,
        *,
        mode: str | None = None,
    ) -> None:
        self.mode = mode or recipe.tfidf_mode
        self.table, self.recipe, self.layer, self._labels = table, recipe, layer, labels
        self.kernels: Kernels = kernels or NumpyKernels()

    def _column(self, name: str) -> NDArray[np.generic]:
        return self.table.require(name, self.layer)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Group of each sampled token, shape (sampled tokens,); no group is empty."""
        if self._labels is not None:
            return self._labels
        sample = self._column("sample")
        if self.mode == "doc":
            return self.table.sample_documents()
        topics = self.kernels.topics(sample, self.recipe.tfidf_k, self.recipe.seed)  # type: ignore[arg-type]
        return np.asarray(np.unique(topics, return_inverse=True)[1], dtype=np.int64)

    @cached_property
    def groups(self) -> int:
        """Number of groups: documents, non-empty topics, or tokens."""
        return int(self.table.tokens.sum()) if self.mode == "token" else int(self.labels.max()) + 1

    @cached_property
    def mean(self) -> Vector:
        """Mean signal over all tokens, exact."""
        return tfidf.term_frequency(self._column("signal_mean"), self.table.tokens)

    @cached_property
    def tf(self) -> Vector:
        """Term frequency."""
        if self.mode != "topic":
            return self.mean
        sample = self._column("sample")
        return tfidf.topic_term_frequency(self.kernels.group_means(sample, self.labels, self.groups))  # type: ignore[arg-type]

    @cached_property
    def df(self) -> Counts:
        """Document frequency."""
        if self.mode == "token":
            return np.asarray(self._column("open_gate").sum(axis=0), dtype=np.int64)
        sample, q = self._column("sample"), self.recipe.q_active
        tau = self.kernels.quantile_threshold(sample, q)  # type: ignore[arg-type]
        active = self.kernels.active_tokens(sample, tau, self.labels, self.groups)  # type: ignore[arg-type]
        return tfidf.document_frequency(active, np.bincount(self.labels, minlength=self.groups), q)

    @cached_property
    def idf(self) -> Vector:
        """Inverse document frequency."""
        return tfidf.inverse_document_frequency(self.df, self.groups)

    @cached_property
    def spikiness(self) -> Vector:
        """Peak signal / mean signal."""
        return tfidf.spikiness(self._column("signal_max").max(axis=0), self.mean)

    @cached_property
    def variance(self) -> Vector:
        """Variance between documents + ``token_weight`` * mean variance between tokens."""
        means, squares = self._column("signal_mean"), self._column("signal_mean_square")
        return tfidf.signal_variance(means, squares, self.table.tokens, token_weight=self.recipe.token_weight)
