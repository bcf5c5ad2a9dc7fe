"""Term frequency, document frequency, inverse document frequency, spikiness: neurons as terms, text as a corpus."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neuronrank_core.errors import InvalidValueError
from neuronrank_core.kernels import Counts, Vector


def over_documents(column: ArrayLike, tokens: ArrayLike) -> Vector:
    """Mean over all tokens of the corpus, from the means of its documents.

    Parameters
    ----------
    column : array, shape (documents, features)
        Per-document means.
    tokens : int array, shape (documents,)
        Tokens of each document.

    Returns
    -------
    float64 array, shape (features,)
    """
    weight = np.asarray(tokens, dtype=np.float64)
    rows = np.asarray(column, dtype=np.float64) * weight[:, None]
    # Sum row by row, so that the result depends only on the order of the documents, not on the machine.
    return np.asarray(np.add.reduce(rows, axis=0) / weight.sum())


def root_mean_square(mean_square: ArrayLike, tokens: ArrayLike) -> Vector:
    """Root mean square over all tokens, from per-document mean squares of shape (documents, features)."""
    return np.sqrt(over_documents(mean_square, tokens))


def term_frequency(signal_mean: ArrayLike, tokens: ArrayLike) -> Vector:
    """Mean signal strength over all tokens (doc and token mode), shape (neurons,)."""
    return over_documents(signal_mean, tokens)


def topic_term_frequency(group_means: ArrayLike) -> Vector:
    """Mean over topics of the topic's mean signal (topic mode); all topics have equal weight.

    Parameters
    ----------
    group_means : array, shape (topics, neurons)
        Mean signal of each non-empty topic's tokens.
    """
    return np.asarray(np.mean(np.asarray(group_means, dtype=np.float64), axis=0))


def group_sums(rows: NDArray[Any], labels: ArrayLike, groups: int, dtype: type = np.float64) -> NDArray[Any]:
    """Sum of each group's rows.

    Parameters
    ----------
    rows : array, shape (tokens, features)
    labels : int array, shape (tokens,)
        Group of each row, in [0, groups).
    groups : int
    dtype : type
        Of the sums.

    Returns
    -------
    array, shape (groups, features); zero for an empty group
    """
    group = np.asarray(labels, dtype=np.int64)
    sizes = np.bincount(group, minlength=groups)
    sums: NDArray[Any] = np.zeros((groups, rows.shape[1]), dtype=dtype)
    filled = sizes > 0
    if (np.diff(group) < 0).any():
        rows = rows[np.argsort(group, kind="stable")]
    sums[filled] = np.add.reduceat(rows, (np.cumsum(sizes) - sizes)[filled], axis=0, dtype=dtype)
    return sums


def group_means(sample: ArrayLike, labels: ArrayLike, groups: int) -> Vector:
    """Mean signal of each group's tokens.

    Parameters
    ----------
    sample : array, shape (tokens, neurons)
    labels : int array, shape (tokens,)
        Group of each token, in [0, groups).
    groups : int

    Returns
    -------
    float64 array, shape (groups, neurons); zero for an empty group
    """
    sizes = np.bincount(np.asarray(labels), minlength=groups)
    return np.asarray(group_sums(np.asarray(sample), labels, groups) / np.maximum(sizes, 1)[:, None])


def quantile_threshold(sample: ArrayLike, q: float) -> NDArray[Any]:
    """`tau`: the q-quantile of each neuron's sampled signal over the whole corpus.

    The order statistic at or above the quantile: number ``ceil(q * (tokens - 1))``, counted from 0. It needs no
    rounding, and the same sampled tokens are at or above it as with an interpolated quantile.

    Parameters
    ----------
    sample : array, shape (tokens, neurons)
        Sampled tokens of all groups. With a separate threshold per group, every neuron would be active in every group.
    q : float in (0, 1)

    Returns
    -------
    array, shape (neurons,), of the dtype of the sample
    """
    check_quantile(q)
    rows = np.asarray(sample)
    # Not by np.quantile: NumPy 2.0 and 2.1 round q to the precision of the sample, and so take another rank.
    rank = math.ceil(float(q) * (len(rows) - 1))
    return np.asarray(np.partition(rows, rank, axis=0)[rank])


def active_tokens(sample: ArrayLike, tau: ArrayLike, labels: ArrayLike, groups: int) -> Counts:
    """Number of each group's sampled tokens with ``a >= tau``, shape (groups, neurons)."""
    return group_sums(np.asarray(sample) >= np.asarray(tau), labels, groups, np.int64)


def document_frequency(active: ArrayLike, group_tokens: ArrayLike, q: float) -> Counts:
    """`df`: the number of groups in which the neuron is active.

    A neuron is active in a group if at least a fraction ``1 - q`` of the group's sampled tokens reaches the neuron's
    threshold ``tau``.

    Parameters
    ----------
    active : int array, shape (groups, neurons)
        Number of tokens of the group at or above the threshold.
    group_tokens : int array, shape (groups,)
        Number of sampled tokens of each group; empty groups are ignored.
    q : float in (0, 1)

    Returns
    -------
    int64 array, shape (neurons,), between 0 and the number of non-empty groups
    """
    check_quantile(q)
    size = np.asarray(group_tokens, dtype=np.int64)
    # Correct for rounding: in floating point 0.4 * 65 may exceed 26. At least one token is needed, as q < 1.
    needed = np.maximum(np.ceil((1.0 - q) * size - 1e-9), 1)
    return np.asarray(np.sum((np.asarray(active) >= needed[:, None]) & (size > 0)[:, None], axis=0, dtype=np.int64))


def inverse_document_frequency(df: ArrayLike, groups: int) -> Vector:
    """`idf = log((groups + 1) / (df + 1)) + 1`, in [1, log(groups + 1) + 1].

    Raises
    ------
    InvalidValueError
        If a ``df`` is outside [0, groups].
    """
    counts = np.asarray(df, dtype=np.float64)
    if counts.size and not (counts.min() >= 0 and counts.max() <= groups):
        raise InvalidValueError("df", (counts.min(), counts.max()), f"[0, {groups}], the number of groups")
    return np.asarray(np.log((groups + 1) / (counts + 1)) + 1)


def spikiness(peak: ArrayLike, mean: ArrayLike) -> Vector:
    """Peak signal / mean signal, >= 1; 1 for a neuron that never fires.

    Parameters
    ----------
    peak, mean : arrays, shape (neurons,)
        Largest and mean signal over all tokens.
    """
    peak, mean = np.asarray(peak, dtype=np.float64), np.asarray(mean, dtype=np.float64)
    return np.asarray(np.divide(peak, mean, out=np.ones_like(mean), where=mean > 0))


def signal_variance(
    signal_mean: ArrayLike, signal_mean_square: ArrayLike, tokens: ArrayLike, *, token_weight: float = 1.0
) -> Vector:
    """Variance of the signal's means between documents + ``token_weight`` * mean variance between tokens.

    Documents are weighted by their tokens, so that ``token_weight = 1`` gives the variance over all tokens (law of
    total variance).

    Parameters
    ----------
    signal_mean, signal_mean_square : arrays, shape (documents, neurons)
        In float32, the variance within a document has an error of about 1e-7 of the mean square.
    tokens : int array, shape (documents,)
    token_weight : float, >= 0

    Returns
    -------
    float64 array, shape (neurons,), >= 0
    """
    means = np.asarray(signal_mean, dtype=np.float64)
    between = over_documents((means - over_documents(means, tokens)) ** 2, tokens)
    within = np.maximum(np.asarray(signal_mean_square, dtype=np.float64) - means**2, 0.0)
    return between + token_weight * over_documents(within, tokens)


def check_quantile(q: float) -> None:
    """Raise InvalidValueError unless ``0 < q < 1``."""
    if not 0.0 < q < 1.0:
        raise InvalidValueError("q_active", q, "(0, 1)")
