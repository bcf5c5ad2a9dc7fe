"""What pruning costs in quality: how far predictions are from those of a reference, and how exact a perplexity is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Quantile of the KL divergence that is reported beside its mean.
_TAIL = 0.99


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a model are from those of a reference, usually the model before pruning.

    Parameters
    ----------
    kl_mean : float
        Mean over the predicted tokens of the KL divergence from the reference's distribution of the next token to the
        model's, KL(reference || model), over the full vocabulary, in nats.
    kl_p99 : float
        99th percentile of the same over the predicted tokens.
    agreement : float
        Fraction of the predicted tokens at which both models have the same most likely token.
    perplexity_change : float
        Relative change of the perplexity: 0.1 where the model's is 10 % above the reference's.
    perplexity_change_error : float or None
        Its standard error, see :func:`perplexity_change`.
    """

    kl_mean: float
    kl_p99: float
    agreement: float
    perplexity_change: float = 0.0
    perplexity_change_error: float | None = None


def log_softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """Logarithms of the probabilities that logits stand for, along the last axis."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def kl_divergence(log_p: ArrayLike, log_q: ArrayLike) -> NDArray[np.float64]:
    """Kullback-Leibler divergence KL(p || q) of each row, in nats.

    Parameters
    ----------
    log_p, log_q : array, shape (positions, vocabulary)
        Logarithms of the probabilities.

    Returns
    -------
    float64 array, shape (positions,)
        Not negative; infinite where q is zero and p is not.
    """
    log_p, log_q = np.asarray(log_p, dtype=np.float64), np.asarray(log_q, dtype=np.float64)
    p = np.exp(log_p)
    ratio = np.subtract(log_p, log_q, out=np.zeros_like(p), where=p > 0)  # 0 log 0 is 0.
    # A sum of rounded terms can be slightly below zero.
    return np.asarray(np.maximum((p * ratio).sum(axis=-1), 0.0))


def same_top(a: ArrayLike, b: ArrayLike) -> NDArray[np.bool_]:
    """Whether each row has its largest value at the same index in both arrays; of ties, the lowest index counts.

    Parameters
    ----------
    a, b : array, shape (positions, vocabulary)
        Logits or probabilities, or their logarithms.

    Returns
    -------
    bool array, shape (positions,)
    """
    return np.asarray(np.argmax(a, axis=-1) == np.argmax(b, axis=-1))


def divergence(kl: ArrayLike, same: ArrayLike, reference_nll: ArrayLike, nll: ArrayLike) -> Divergence:
    """Summarise all predicted tokens.

    Parameters
    ----------
    kl : array, shape (tokens,)
        From :func:`kl_divergence`.
    same : bool array, shape (tokens,)
        From :func:`same_top`.
    reference_nll, nll : array, shape (windows,)
        See :func:`perplexity_change`.
    """
    values = np.asarray(kl, dtype=np.float64)
    agreement = np.asarray(same, dtype=np.float64).mean()
    change = perplexity_change(reference_nll, nll)
    return Divergence(float(values.mean()), float(np.quantile(values, _TAIL)), float(agreement), *change)


def perplexity_change(reference_nll: ArrayLike, nll: ArrayLike) -> tuple[float, float | None]:
    """Relative change of a perplexity, and its standard error over windows of equal length.

    The windows are compared in pairs: what makes a window hard for both models cancels. The error is that of
    :func:`perplexity_standard_error` for the differences, so it is far smaller than those of the two perplexities.

    Parameters
    ----------
    reference_nll, nll : array, shape (windows,)
        Mean negative log-likelihood of each window, in nats, before and after.

    Returns
    -------
    change : float
        ``after / before - 1``.
    standard_error : float or None
        None for a single window.
    """
    moved = np.asarray(nll, dtype=np.float64) - np.asarray(reference_nll, dtype=np.float64)
    with np.errstate(over="ignore"):
        return float(np.expm1(moved.mean())), perplexity_standard_error(moved)


def first_within_error(nll: Mapping[str, ArrayLike]) -> str:
    """The first model whose perplexity is not measurably above the lowest one, nor above that of the first model.

    The one-standard-error rule of Breiman et al. 1984, "Classification and Regression Trees": of models in the order of
    how far they go, a later one has to be better by more than one standard error of the difference.

    Parameters
    ----------
    nll : dict of array, shape (windows,)
        Mean negative log-likelihood of each window, in nats, by the names of the models.

    Returns
    -------
    str
        Of a single window, which has no standard error: the model with the lowest perplexity.
    """
    mean = {name: float(np.asarray(values, dtype=np.float64).mean()) for name, values in nll.items()}
    first, lowest = next(iter(mean)), min(mean, key=lambda name: mean[name])

    def close(name: str) -> bool:
        change, error = perplexity_change(nll[lowest], nll[name])
        return mean[name] <= mean[first] and change <= (error or 0.0)

    return next(filter(close, nll))


#: A difference counts as noise if it is not larger than this many standard errors.
NOISE = 2.0


def perplexity_standard_error(nll: ArrayLike, reference: ArrayLike | None = None) -> float | None:
    """Standard error of a perplexity over windows of equal length, or of a difference, by the delta method.

    The windows count as independent draws from the text. The standard error of the mean negative log-likelihood is the
    sample standard deviation over the windows (with ``windows - 1``) / sqrt(windows). The derivative of the exponential
    carries it over to the perplexity: multiplied by the perplexity.

    Two models on the same windows are compared window by window, so what makes a window hard for both cancels. The
    standard error of ``exp(mean(nll)) - exp(mean(reference))`` is that of the mean of
    ``exp(mean(nll)) * nll - exp(mean(reference)) * reference``.

    Parameters
    ----------
    nll : array, shape (windows,)
        Mean negative log-likelihood of each window, in nats.
    reference : array, shape (windows,), optional
        The same of another model on the same windows.

    Returns
    -------
    float or None
        None for a single window, which says nothing about the variation between windows.
    """
    values = np.asarray(nll, dtype=np.float64)
    if values.size < 2:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        slopes = np.exp(values.mean()) * values
        if reference is not None:
            other = np.asarray(reference, dtype=np.float64)
            slopes = slopes - np.exp(other.mean()) * other
        return float(slopes.std(ddof=1) / np.sqrt(values.size))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Confidence interval of the median of at least 95 %, whatever the distribution; their range for fewer than six.

    The k-th smallest and the k-th largest of n independent values hold the median between them unless fewer than k
    values are on one side of it, which has a probability of ``2 * sum(comb(n, i) for i < k) / 2^n``. The largest such k
    is used: of nine values the second, with 96 %.

    Parameters
    ----------
    values : sequence of float

    Returns
    -------
    lower, upper : float
    """
    ordered, n = sorted(values), len(values)
    k = 1
    while 2 * sum(comb(n, i) for i in range(k + 1)) <= 0.05 * 2**n:
        k += 1
    return ordered[k - 1], ordered[n - k]
