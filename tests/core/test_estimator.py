"""The estimator is the core's own path, with labels for documents: by hand, by brute force, and against that path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import random_layer, seeds

from neuronrank_core import (
    METHODS,
    InputError,
    NeuronRank,
    NeuronStatistics,
    NonFiniteError,
    Recipe,
    document_statistics,
    merge,
)
from neuronrank_core.methods import mode
from neuronrank_core.statistics import topics as kmeans

VECTORS = ("tf_", "df_", "idf_", "spikiness_")


def data(seed: int = 0, rows: int = 40, neurons: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Activations of which some are negative and some alike, and a class for each row on a level of its own."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, rows)
    labels[:4] = range(4)
    return (rng.normal(size=(rows, neurons)) + 2 * rng.normal(size=(4, neurons))[labels]).round(1), labels


@given(seeds, st.sampled_from([0.3, 0.6, 0.9]))
def test_df_counts_the_labels_under_which_a_neuron_is_strong(seed: int, q: float) -> None:
    a, labels = data(seed)
    rank = NeuronRank(q_active=q).fit(a, labels)
    for neuron, signal in enumerate(abs(a).astype(np.float32).T):
        tau = np.sort(signal)[int(np.ceil(q * (len(signal) - 1)))]
        active = sum(np.mean(signal[labels == label] >= tau) >= 1 - q - 1e-12 for label in range(4))
        assert rank.df_[neuron] == active
        assert rank.idf_[neuron] == pytest.approx(np.log(5 / (active + 1)) + 1)
        assert rank.tf_[neuron] == pytest.approx(signal.mean(), rel=1e-6)
        assert rank.spikiness_[neuron] == pytest.approx(signal.max() / signal.mean(), rel=1e-6)


def test_labels_of_documents_are_documents() -> None:
    documents = random_layer().documents
    gates = [d.gate for d in documents]
    rank = NeuronRank(q_active=0.7).fit(np.concatenate(gates), np.repeat(range(len(gates)), list(map(len, gates))))
    table = merge(document_statistics(i, signal=abs(g), gate=g) for i, g in enumerate(gates))
    neurons = NeuronStatistics(table, Recipe(q_active=0.7))
    for name in VECTORS:
        assert np.array_equal(getattr(rank, name), getattr(neurons, name.strip("_"))), name


def test_each_position_of_a_sample_is_a_row_with_its_label() -> None:
    rng = np.random.default_rng(5)
    images, x, reader = rng.normal(size=(9, 6, 2, 4)), rng.normal(size=(9, 3, 2, 4)), rng.normal(size=(5, 6, 3, 3))
    labels = rng.integers(0, 3, 9)
    pixels = [images[i, :, h, w] for i in range(9) for h in range(2) for w in range(4)]
    read = [x[i, :, h, w] for i in range(9) for h in range(2) for w in range(4)]
    norms = np.array([[np.linalg.norm(reader[:, channel]) for channel in range(6)]])
    for name in ("neuronrank_wanda", "neuronrank_tfidf"):
        whole = NeuronRank(name, idf_exp=1).fit(images, labels, inputs=x, outgoing=reader)
        rows = NeuronRank(name, idf_exp=1).fit(pixels, np.repeat(labels, 8), inputs=read, outgoing=norms)
        np.testing.assert_allclose(whole.neuron_scores(), rows.neuron_scores())
        assert np.array_equal(whole.df_, rows.df_)
        assert np.array_equal(whole.mask(np.ones((6, 3)), 0.5), rows.mask(np.ones((6, 3)), 0.5))


def test_labels_of_topics_are_topics() -> None:
    a, _ = data(rows=60)
    found = NeuronRank(tfidf_mode="topic", tfidf_k=5, seed=3).fit(a)
    topics = kmeans.topics(abs(a).astype(np.float32), 5, 3)
    given_ = NeuronRank(tfidf_mode="topic").fit(a, topics)
    for name in VECTORS:
        np.testing.assert_allclose(getattr(found, name), getattr(given_, name), rtol=1e-6, err_msg=name)
    # Rare topics count as much as common ones there, and rows count alike otherwise.
    means = np.array([abs(a)[topics == t].mean(axis=0) for t in np.unique(topics)])
    np.testing.assert_allclose(given_.tf_, means.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(NeuronRank().fit(a, topics).tf_, abs(a).mean(axis=0), rtol=1e-6)


def test_in_token_mode_every_row_is_a_group() -> None:
    a, _ = data()
    rank = NeuronRank(tfidf_mode="token", threshold=0.5).fit(a)
    assert rank.df_.tolist() == (a > 0.5).sum(axis=0).tolist()
    np.testing.assert_allclose(rank.idf_, np.log(41 / ((a > 0.5).sum(axis=0) + 1)) + 1)
    old = NeuronRank("neuronrank_old", threshold=0.5).fit(a)
    assert np.array_equal(old.neuron_scores(), rank.neuron_scores())


@pytest.mark.parametrize("names", [["d", "a", "c", "b"], [7.5, -1.0, 0.0, 2.0]])
def test_names_of_labels_and_order_of_rows_do_not_matter(names: list[Any]) -> None:
    a, labels = data()
    shuffled = np.random.default_rng(1).permutation(len(a))
    one, other = NeuronRank().fit(a, labels), NeuronRank().fit(a[shuffled], np.array(names)[labels[shuffled]])
    assert np.array_equal(one.df_, other.df_)
    np.testing.assert_allclose(one.neuron_scores(), other.neuron_scores(), rtol=1e-6)


def test_variance_between_groups_is_that_of_the_given_ones() -> None:
    a, labels = data()
    rank = NeuronRank("neuronrank_unstructured", token_weight=0).fit(a, labels)
    means = np.array([abs(a)[labels == label].mean(axis=0) for label in range(4)])[labels]
    np.testing.assert_allclose(rank.neuron_scores(), means.var(axis=0), rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_seed_formula_by_hand(axis: int) -> None:
    a, labels = data()
    rank = NeuronRank(weight_exp=0.5, tf_exp=2, idf_exp=1.5, spikiness_exp=0.3).fit(a, labels)
    weight = np.random.default_rng(0).normal(size=(6, 6))
    neuron = rank.tf_**2 * rank.idf_**1.5 * rank.spikiness_**0.3
    expected = [[abs(weight[i, k]) ** 0.5 * neuron[(i, k)[axis]] for k in range(6)] for i in range(6)]
    np.testing.assert_allclose(rank.scores(weight, axis=axis), expected)


def test_a_convolution_is_scored_by_its_output_channels() -> None:
    a, labels = data()
    rank, kernel = NeuronRank().fit(a, labels), np.random.default_rng(0).normal(size=(6, 2, 3, 3))
    expected = abs(kernel) * (rank.tf_ * rank.idf_)[:, None, None, None]
    np.testing.assert_allclose(rank.scores(kernel), expected)
    assert rank.mask(kernel, 0.3).shape == kernel.shape
    assert set(expected[rank.mask(kernel, 0.3)]) == set(np.sort(expected, axis=None)[: int(0.3 * kernel.size)])


def test_a_convolution_and_its_inputs() -> None:
    rng = np.random.default_rng(5)
    images, x, kernel = rng.normal(size=(9, 6, 2, 4)), rng.normal(size=(9, 3, 2, 4)), rng.normal(size=(6, 3, 3, 2))
    x *= np.array([1, 20, 300])[:, None, None]
    wanda = NeuronRank("wanda").fit(images, inputs=x)
    rms = np.sqrt((x**2).mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(wanda.scores(kernel), abs(kernel) * rms[:, None, None], rtol=1e-6)
    for name in ("ria", "neuronrank_wanda"):
        assert NeuronRank(name).fit(images, inputs=x).mask(kernel, 0.5).sum() == kernel.size // 2
    with pytest.raises(InputError, match=r"shape \(6, 4, 3, 2\), expected 3 inputs"):
        wanda.scores(np.ones((6, 4, 3, 2)))


def test_inputs_are_needed_only_by_what_reads_them() -> None:
    rank = NeuronRank("dass").fit(A)
    np.testing.assert_allclose(rank.scores(np.ones((6, 2)))[:, 0], (A**2).mean(axis=0) ** 0.25, rtol=1e-6)
    grouped = np.ones((6, 2, 3, 3))  # A convolution of which each group reads some of the channels.
    assert NeuronRank("magnitude").fit(A, inputs=A).mask(grouped, 0.5).sum() == grouped.size // 2


def test_what_was_fitted_stays_as_it_was() -> None:
    a, labels = data()
    x, out = np.random.default_rng(0).normal(size=(40, 5)), np.random.default_rng(1).normal(size=(3, 6))
    rank = NeuronRank("neuronrank_wanda", idf_exp=1).fit(a, labels, inputs=x, outgoing=out)
    before = rank.scores(np.ones((6, 5))), rank.neuron_scores()
    for array in (a, labels, x, out):
        array[:] = 0
    assert np.array_equal(rank.scores(np.ones((6, 5))), before[0])
    assert np.array_equal(rank.neuron_scores(), before[1])


def test_settings_of_numpy() -> None:
    grid = {"tfidf_k": np.int64(5), "tf_exp": np.float32(0.5), "q_active": np.float64(0.7), "seed": np.int32(1)}
    rank = NeuronRank(tfidf_mode="topic", **grid).fit(A)
    plain = NeuronRank(tfidf_mode="topic", tfidf_k=5, tf_exp=0.5, q_active=0.7, seed=1).fit(A)
    assert np.array_equal(rank.neuron_scores(), plain.neuron_scores())
    assert np.array_equal(rank.neuron_mask(np.float32(0.5)), plain.neuron_mask(0.5))


def test_as_many_topics_as_rows() -> None:
    assert NeuronRank(tfidf_mode="topic", tfidf_k=8193).recipe.tfidf_k == 8193


def test_a_convolution_that_reads_the_neurons() -> None:
    a, labels = data()
    kernel = np.random.default_rng(0).normal(size=(5, 6, 3, 2))
    rms = np.sqrt((a**2).mean(axis=0))
    wanda = NeuronRank("wanda").fit(a, inputs=a)
    expected = abs(kernel) * rms[None, :, None, None]
    np.testing.assert_allclose(wanda.scores(kernel, axis=1), expected, rtol=1e-6)
    # An output with all its kernels is a row: 36 weights, of which 10 go.
    mask = wanda.mask(kernel, 0.3, axis=1)
    for out in range(5):
        assert set(expected[out][mask[out]].round(9)) == set(np.sort(expected[out], axis=None)[:10].round(9))
    seed = NeuronRank().fit(a, labels)
    factor = (seed.tf_ * seed.idf_)[None, :, None, None]
    np.testing.assert_allclose(seed.scores(kernel, axis=1), abs(kernel) * factor, rtol=1e-6)


def test_it_is_the_path_that_language_models_take() -> None:
    layer = random_layer()
    x, hidden = (np.concatenate([getattr(d, name) for d in layer.documents]) for name in ("x", "hidden"))
    labels = np.repeat(range(4), [len(d.x) for d in layer.documents])
    for method in METHODS.values():
        recipe = Recipe(method=method.name, signal="product", token_weight=0.3)
        rank = NeuronRank(method.name, token_weight=0.3)
        # The gate is what opens in token mode there, and the activation itself here.
        if mode(recipe) != "token":
            rank.fit(hidden, labels, inputs=x, outgoing=layer.weights["down_proj"])
            for axis, module in enumerate(("gate_proj", "down_proj")):
                theirs = method.score(module, layer.context(recipe))
                np.testing.assert_allclose(rank.scores(layer.weights[module], axis), theirs, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.77, 1.0])
def test_exact_sparsity(method: str, ratio: float) -> None:
    a, labels = data()
    rank = NeuronRank(method, compare="module").fit(a, None if method == "neuronrank_old" else labels, inputs=a[:, :5])
    weight = np.random.default_rng(0).normal(size=(6, 5))
    kept = weight.copy()
    for axis, w in enumerate((weight, weight.T)):
        assert rank.mask(w, ratio, axis).sum() == int(ratio * 30)
    assert np.array_equal(weight, kept)
    if METHODS[method].ranks_neurons and method != "magnitude":
        goes = rank.neuron_mask(ratio)
        assert goes.sum() == int(ratio * 6)
        assert set(np.flatnonzero(goes)) == set(np.argsort(rank.neuron_scores(), kind="stable")[: int(ratio * 6)])


def test_patterns() -> None:
    a, labels = data()
    weight = np.random.default_rng(0).normal(size=(6, 8))
    mask = NeuronRank("magnitude", sparsity_type="2:4").fit(a, labels).mask(weight)
    assert (mask.reshape(-1, 4).sum(axis=1) == 2).all()


def test_neurons_count_by_what_leaves_through_them() -> None:
    a, _ = data()
    out = np.random.default_rng(0).normal(size=(3, 6))
    rms = np.sqrt((a**2).mean(axis=0))
    alone = NeuronRank("neuronrank_wanda").fit(a, inputs=a)
    reaching = NeuronRank("neuronrank_wanda").fit(a, inputs=a, outgoing=out)
    np.testing.assert_allclose(alone.neuron_scores(), rms**0.5, rtol=1e-6)
    np.testing.assert_allclose(reaching.neuron_scores(), (rms * np.linalg.norm(out, axis=0)) ** 0.5, rtol=1e-6)


A, LABELS = data()


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"nsamples": 3}, {}, "setting is 'nsamples', allowed: one of"),
        ({"q_active": 2}, {}, "q_active is 2"),
        ({}, {"activations": A[0]}, r"activations have shape \(6,\), expected any rows of any columns"),
        ({}, {}, "IDF of neuronrank_tfidf needs groups"),
        ({}, {"groups": LABELS[1:]}, r"groups have shape \(39,\), expected \(40,\)"),
        ({"tfidf_mode": "token"}, {"groups": LABELS}, "every row is a group"),
        ({"idf_exp": 0}, {"inputs": A[1:]}, r"inputs have shape \(39, 6\), expected 40 rows of any columns"),
        ({"idf_exp": 0}, {"outgoing": A[:, 1:]}, r"outgoing have shape \(40, 5\), expected any rows of 6 columns"),
        ({}, {"groups": [None, *"ab"] * 13 + ["a"]}, "groups have no order"),
        *(
            ({"sparsity_type": kind, "method": "magnitude"}, {}, f"sparsity_type is '{kind}'")
            for kind in ("heads", "layers", "experts")
        ),
        ({"tfidf_mode": "topic", "tfidf_k": 41}, {}, r"tfidf_k is 41, allowed: \[1, 40\]"),
        ({"idf_exp": 0}, {"activations": np.ma.masked_greater(A, 0.5)}, "activations are masked"),
        ({"idf_exp": 0}, {"inputs": A + 1j}, "inputs are complex"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NeuronRank(**settings).fit(**{"activations": A, **arguments})


@pytest.mark.parametrize("weight", [np.ma.masked_greater(np.ones((6, 2)), 0), np.ones((6, 2)) * 1j])
def test_a_weight_that_would_lose_something_is_refused(weight: np.ndarray) -> None:
    with pytest.raises(InputError, match="weights are"):
        NeuronRank().fit(A, LABELS).mask(weight, np.float32(0.5))


@pytest.mark.parametrize(
    ("shape", "axis"), [((0, 6), 1), ((5, 6), 0), ((6, 5), 1), ((6,), 0), ((5, 7, 3), 1), ((6, 6), 2), ((6, 6), -1)]
)
def test_a_weight_that_does_not_fit_is_refused(shape: tuple[int, ...], axis: int) -> None:
    with pytest.raises(InputError, match=r"shape|axis"):
        NeuronRank().fit(A, LABELS).scores(np.ones(shape), axis)


@pytest.mark.parametrize(
    ("shape", "axis", "expected", "hint"),
    [
        ((5, 6, 3, 3), 0, r"\(6, in, \.\.\.\)", "set axis=1"),
        ((6, 5, 3, 3), 1, r"\(out, 6, \.\.\.\)", "set axis=0"),
        ((5, 7), 0, r"\(6, in, \.\.\.\)", ""),
    ],
)
def test_the_shape_that_fits_is_named(shape: tuple[int, ...], axis: int, expected: str, hint: str) -> None:
    with pytest.raises(InputError, match=rf"expected {expected} with axis {axis}") as caught:
        NeuronRank().fit(A, LABELS).mask(np.ones(shape), 0.5, axis)
    assert caught.value.hint == hint


def test_errors_that_other_errors_would_hide() -> None:
    with pytest.raises(InputError, match="wanda needs the layer's inputs"):
        NeuronRank("wanda").fit(A).scores(np.ones((6, 2)))
    assert NeuronRank("wanda").fit(A).scores(np.ones((2, 6)), axis=1).shape == (2, 6)
    with pytest.raises(InputError, match="not fitted yet"):
        NeuronRank().scores(np.ones((6, 2)))
    assert not hasattr(NeuronRank(), "tf_")
    with pytest.raises(NonFiniteError, match="layer conv2"):
        NeuronRank(layer="conv2").fit(np.where(A[3, 2] == A, np.nan, A), LABELS)
    with pytest.raises(InputError, match="no score for whole neurons"):
        NeuronRank("magnitude").fit(A).neuron_mask(0.5)
