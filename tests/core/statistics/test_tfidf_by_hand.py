"""TF, DF, IDF, spikiness and variance of corpora small enough to work out on paper."""

from __future__ import annotations

import numpy as np
import pytest

from neuronrank_core import InvalidValueError, NeuronStatistics, Recipe, document_statistics, merge
from neuronrank_core.statistics import tfidf
from neuronrank_core.statistics.numpy_kernels import NumpyKernels


def corpus(*documents: list[float], **fields: float) -> NeuronStatistics:
    """One neuron over documents of given signals, in doc mode."""
    table = merge(document_statistics(i, signal=[[v] for v in a]) for i, a in enumerate(documents))
    return NeuronStatistics(table, Recipe(**fields))


def test_term_frequency_is_a_mean_over_tokens_not_over_documents() -> None:
    # (4 + 1 + 2 + 3) / 4; the mean of the documents' means would be 3.
    assert corpus([4.0], [1.0, 2.0, 3.0]).tf.tolist() == [2.5]


@pytest.mark.parametrize(
    ("documents", "df"),
    [
        # tau is the order statistic at or above 0.6 * 9 = 5.4, the 6: two tokens of five reach it in each document,
        # 0.4 = 1 - q of them.
        (([0, 6, 1, 7, 2], [8, 3, 9, 4, 5]), 2),
        # One of five, then three of five.
        (([0, 1, 2, 3, 6], [4, 5, 7, 8, 9]), 1),
        # None, then all four.
        (([0, 1, 2, 3, 4, 5], [6, 7, 8, 9]), 1),
        # Equal signals: all of them are at the threshold.
        (([3, 3], [3, 3, 3], [3]), 3),
    ],
)
def test_document_frequency(documents: tuple[list[float], ...], df: int) -> None:
    neurons = corpus(*documents)
    assert neurons.groups == len(documents)
    assert neurons.df.tolist() == [df]
    assert neurons.idf[0] == pytest.approx(np.log((len(documents) + 1) / (df + 1)) + 1)


@pytest.mark.parametrize(
    ("documents", "q", "df"),
    [
        # tau = 3: 1 of 2 and 6 of 8 tokens, of which 1.5 and 6 are needed.
        (([0, 10], [1, 2, 3, 4, 5, 6, 7, 8]), 0.25, 1),
        # tau = 5: 1 of 2 and 4 of 8, enough twice.
        (([0, 10], [1, 2, 3, 4, 5, 6, 7, 8]), 0.5, 2),
        # tau = 10: 1 of 2 and 0 of 8, of which 0.2 and 0.8 are needed.
        (([0, 10], [1, 2, 3, 4, 5, 6, 7, 8]), 0.9, 1),
        # tau = 1: 1 of 2, of which 1.4 are needed.
        (([0, 1],), 0.3, 0),
    ],
)
def test_q_sets_the_strength_and_the_fraction(documents: tuple[list[float], ...], q: float, df: int) -> None:
    assert corpus(*documents, q_active=q).df.tolist() == [df]


def test_inverse_document_frequency() -> None:
    idf = tfidf.inverse_document_frequency([0, 1, 3], groups=3)
    assert idf == pytest.approx([2.386294361119891, 1.6931471805599454, 1.0], rel=1e-15)


def test_the_fraction_is_meant_exactly() -> None:
    # 0.4 * 65 is 26, though 1 - 0.6 is a hair above 0.4 in binary.
    assert tfidf.document_frequency([[26, 25]], [65], 0.6).tolist() == [1, 0]
    # However close q comes to 1, a group in which the neuron never fires is not one of its groups.
    assert tfidf.document_frequency([[1, 0]], [64], 1 - 1e-12).tolist() == [1, 0]


def test_an_empty_group_is_no_group() -> None:
    assert tfidf.document_frequency([[2], [0], [0]], [2, 0, 3], 0.6).tolist() == [1]


def test_topic_term_frequency_counts_rare_topics_as_much_as_common_ones() -> None:
    sample, labels = [[1.0]] * 6 + [[5.0]] * 2, [0] * 6 + [1] * 2
    means = tfidf.group_means(sample, labels, 2)
    assert means.tolist() == [[1.0], [5.0]]
    assert tfidf.topic_term_frequency(means).tolist() == [3.0]  # the mean over tokens is 2


def test_a_topic_without_tokens_is_no_group() -> None:
    class Gap(NumpyKernels):
        @staticmethod
        def topics(sample: np.ndarray, k: int, seed: int) -> np.ndarray:
            assert (sample.shape, k, seed) == ((4, 1), 3, 7)
            return np.array([2, 0, 2, 2])

    table = document_statistics(0, signal=[[1.0], [5.0], [2.0], [3.0]])
    neurons = NeuronStatistics(table, Recipe(tfidf_mode="topic", tfidf_k=3, seed=7), Gap())
    assert neurons.groups == 2
    assert neurons.labels.tolist() == [1, 0, 1, 1]
    assert neurons.tf.tolist() == [3.5]  # of the means 5 and 2
    assert neurons.df.tolist() == [1]  # tau is 3, reached by 1 of 1 and 1 of 3 tokens, of which 1.2 are needed
    assert neurons.idf == pytest.approx([np.log(3 / 2) + 1])


def test_spikiness() -> None:
    assert corpus([6.0, 0.0], [0.0, 0.0]).spikiness.tolist() == [4.0]
    assert corpus([2.0, 2.0], [2.0]).spikiness.tolist() == [1.0]
    assert corpus([0.0, 0.0], [0.0]).spikiness.tolist() == [1.0]  # a neuron that never fires is flat


@pytest.mark.parametrize(("token_weight", "expected"), [(0.0, 2.0), (1.0, 8 / 3), (3.0, 4.0)])
def test_variance(token_weight: float, expected: float) -> None:
    # Means 2 (twice) and 5 around 3: (2 * 1 + 4) / 3 = 2. Within: (1 + 1 + 0) / 3 = 2/3.
    assert corpus([1.0, 3.0], [5.0], token_weight=token_weight).variance == pytest.approx([expected])


def test_root_mean_square() -> None:
    # (3 * 4 + 1 * 8) / 4 = 5
    assert tfidf.root_mean_square([[4.0], [8.0]], [3, 1]) == pytest.approx([5**0.5])


def test_open_gates_are_the_document_frequency_of_token_mode() -> None:
    gates = [[-1.0, 2.0, 0.0], [0.5]]
    table = merge(
        document_statistics(i, signal=[[abs(v)] for v in g], gate=[[v] for v in g]) for i, g in enumerate(gates)
    )
    neurons = NeuronStatistics(table, Recipe(tfidf_mode="token"))
    assert neurons.groups == 4
    assert neurons.df.tolist() == [2]
    assert neurons.idf == pytest.approx([np.log(5 / 3) + 1])


@pytest.mark.parametrize("df", [[-1], [4]])
def test_a_count_outside_the_groups_is_an_error(df: list[int]) -> None:
    with pytest.raises(InvalidValueError, match="the number of groups"):
        tfidf.inverse_document_frequency(df, groups=3)


@pytest.mark.parametrize("q", [0.0, 1.0, -0.1, float("nan")])
def test_a_quantile_at_the_ends_is_an_error(q: float) -> None:
    with pytest.raises(InvalidValueError, match="q_active"):
        tfidf.quantile_threshold(np.ones((3, 2)), q)
    with pytest.raises(InvalidValueError, match="q_active"):
        tfidf.document_frequency([[1]], [2], q)
