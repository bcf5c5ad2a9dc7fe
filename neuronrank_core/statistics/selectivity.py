"""Describe neurons for a reader: the groups and tokens that each neuron is selective for."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neuronrank_core.kernels import Vector
from neuronrank_core.statistics.tfidf import inverse_document_frequency


def lift(group_means: ArrayLike) -> Vector:
    """Mean signal of each neuron in a group, relative to its mean over the groups.

    Parameters
    ----------
    group_means : array, shape (groups, neurons)
        Mean signal of each group's tokens, >= 0.

    Returns
    -------
    float64 array, shape (groups, neurons), in [0, groups]; 1 for a neuron that never fires
    """
    means = np.asarray(group_means, dtype=np.float64)
    typical = np.broadcast_to(means.mean(axis=0), means.shape)
    return np.asarray(np.divide(means, typical, out=np.ones_like(means), where=typical > 0))


def typical_terms(terms: Sequence[str], labels: ArrayLike, groups: int, most: int) -> list[list[str]]:
    """Find the most typical terms of each group, by TF-IDF with the groups as documents.

    Parameters
    ----------
    terms : sequence of str
        Term at each token.
    labels : int array, shape (tokens,)
        Group of each token, in [0, groups).
    groups : int
    most : int
        Maximum number of terms per group.

    Returns
    -------
    list of lists
        Terms of each group, most typical first; ties in alphabetical order.
    """
    words, index = np.unique(np.asarray(terms, dtype=object).astype(str), return_inverse=True)
    counts = np.zeros((groups, len(words)), dtype=np.int64)
    np.add.at(counts, (np.asarray(labels), index), 1)
    scores = counts * inverse_document_frequency(np.sum(counts > 0, axis=0), groups)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :most]
    return [[str(words[i]) for i in row if counts[group, i]] for group, row in enumerate(order)]


def by_selectivity(idf: ArrayLike, spikiness: ArrayLike) -> NDArray[np.int64]:
    """Sort neurons from the most specialised to the most general: by IDF, then by spikiness.

    Parameters
    ----------
    idf, spikiness : arrays, shape (neurons,)

    Returns
    -------
    int64 array, shape (neurons,)
        Indices; ties in ascending order.
    """
    return np.lexsort((-np.asarray(spikiness), -np.asarray(idf)))


def strongest_tokens(signal: ArrayLike, documents: ArrayLike, most: int) -> NDArray[np.int64]:
    """Find the tokens where a neuron fires most strongly, at most one per document.

    Parameters
    ----------
    signal : array, shape (tokens,)
        The neuron's signal.
    documents : int array, shape (tokens,)
        Document of each token.
    most : int
        Maximum number of tokens.

    Returns
    -------
    int64 array, shape (at most ``most``,)
        Indices, strongest first; ties in ascending order. Tokens with signal 0 are omitted.
    """
    a, document = np.asarray(signal), np.asarray(documents)
    order = np.argsort(-a, kind="stable")
    order = order[a[order] > 0]
    _, first = np.unique(document[order], return_index=True)
    return order[np.sort(first)][:most]
