"""What a page says of neurons, on statistics with a planted pattern."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import tiny_tokenizer

from neuronrank_core import LayerStatistics, Recipe, document_statistics, merge
from neuronrank_core.errors import InputError
from neuronrank_core.statistics.experts import expert_statistics
from neuronrank_core.statistics.numpy_kernels import NumpyKernels
from neuronrank_torch.runs.page.experts import describe_experts
from neuronrank_torch.runs.page.neurons import LayerNeurons, distributions, layer_neurons, tf_idf_map
from neuronrank_torch.runs.page.passages import AFTER, BEFORE, Passages
from neuronrank_torch.runs.page.specialists import pick
from neuronrank_torch.runs.page.topics import describe_topics

TEXTS = ["the <b>cat</b> sat on the mat, and the dog ran off", "é 12 is the 34 of all 56, or so they say in 78 to 90"]
LENGTH = 48
KERNELS = NumpyKernels()


@pytest.fixture(scope="module")
def passages() -> Passages:
    tokenizer = tiny_tokenizer()
    return Passages(np.array([tokenizer(text)["input_ids"][:LENGTH] for text in TEXTS]), tokenizer)


def table(signal: np.ndarray, tokens_per_document: int = 64) -> LayerStatistics:
    """Statistics of a signal of shape (documents, tokens, neurons)."""
    rows = [document_statistics(i, signal=s, tokens_per_document=tokens_per_document) for i, s in enumerate(signal)]
    return merge(rows)


def characters(index: int) -> list[str]:
    """Characters of a text by byte, as the tokenizer of the tests has them; one of two bytes twice."""
    return [c for c in TEXTS[index] for _ in c.encode()][:LENGTH]


def test_a_neuron_that_fires_on_a_character_is_shown_with_it(passages: Passages) -> None:
    signal = np.full((2, LENGTH, 2), 0.1)
    signal[0, [c == "m" for c in characters(0)], 1] = 5
    signal[1, 20, 1] = 7
    shown = passages.strongest(table(signal), signal[..., 1].ravel(), 3)
    assert [(p["document"], p["signal"]) for p in shown] == [(1, 7.0), (0, 5.0)]
    assert (shown[0]["position"], shown[0]["token"]) == (20, characters(1)[20])
    assert shown[1]["token"] == "m"
    assert shown[1]["before"] == "at</b> sat on the "
    for p in shown:
        around = p["before"] + p["token"] + p["after"]
        assert around in TEXTS[p["document"]]
        assert len(p["before"]) <= BEFORE
        assert len(p["after"].encode()) <= AFTER


@pytest.mark.parametrize(("position", "token"), [(3, "␣"), (4, "<")])
def test_white_space_is_shown_by_a_sign(passages: Passages, position: int, token: str) -> None:
    signal = np.zeros((2, LENGTH, 1))
    signal[0, position] = 1
    assert passages.strongest(table(signal), signal.ravel(), 1)[0]["token"] == token


def test_words_are_those_at_the_sampled_positions(passages: Passages) -> None:
    words = passages.sampled_tokens(table(np.ones((2, LENGTH, 1)), tokens_per_document=16))
    expected = [c.strip() or "␣" for c in characters(0)[::3]]
    assert words[:16] == expected
    assert words[16] == "�"  # Half of the first letter of the second text.


def test_statistics_of_more_documents_than_the_text_gives(passages: Passages) -> None:
    with pytest.raises(InputError, match="documents that the text does not have"):
        passages.sampled_tokens(table(np.ones((3, LENGTH, 1))))


def test_topics_name_the_words_and_neurons_that_make_them(passages: Passages) -> None:
    digit = np.array([[c.isdigit() for c in characters(i)] for i in (0, 1)])
    rng = np.random.default_rng(0)
    signal = 0.05 * rng.random((2, LENGTH, 6))
    signal[digit, 4] += 1  # Neuron 4 fires on digits, all the others on the rest.
    signal[~digit] += [1, 1, 1, 1, 0, 1]
    known = table(signal)
    recipe = Recipe(method="neuronrank_tfidf", tfidf_mode="topic", tfidf_k=2, nsamples=2, seqlen=LENGTH)
    shown = describe_topics(7, known, recipe, KERNELS, passages.sampled_tokens(known))
    assert (shown["layer"], shown["groups"], shown["tokens"]) == (7, 2, 2 * LENGTH)
    prose, digits = shown["topics"]
    assert (prose["tokens"], digits["tokens"]) == ((~digit).sum(), digit.sum())
    assert set(digits["words"]) == set("12345678")
    assert not set(prose["words"]) & set("0123456789")
    assert digits["neurons"][0]["neuron"] == 4
    assert digits["neurons"][0]["lift"] == pytest.approx(2, abs=0.1)
    assert describe_topics(7, known, recipe, KERNELS, None)["topics"][0]["words"] == []


def neurons(layer: int, tf: list[float], idf: list[float]) -> LayerNeurons:
    count = len(tf)
    return LayerNeurons(layer, 4, np.array(tf), np.array(idf), np.full(count, 2.0), np.arange(count) % 5)


def test_specialists_are_rare_and_strong_and_of_different_layers() -> None:
    # Neuron 0 of each layer is the most selective but hardly fires; of the rest, IDF rises with the number.
    layers = [neurons(i, [0.1, 1, 1, 1, 1], [9, 1.1 + i / 100, 1.2, 1.3, 1.4 + i / 100]) for i in range(3)]
    shown = pick(layers)
    assert [(n["layer"], n["neuron"]) for n in shown["specialists"]] == [(2, 4), (1, 4), (0, 4), (0, 3), (1, 3), (2, 3)]
    assert [(n["layer"], n["neuron"]) for n in shown["generalists"]][:3] == [(0, 1), (1, 1), (2, 1)]
    assert shown["specialists"][0]["idf"] == pytest.approx(1.42)


def test_every_neuron_that_fires_is_on_the_map() -> None:
    rng = np.random.default_rng(1)
    signal = rng.gamma(1.0, size=(8, 30, 50)) * rng.lognormal(size=50)
    signal[:, :, 3] = 0
    recipe = Recipe(method="neuronrank_tfidf", nsamples=8)
    layers = [layer_neurons(i, table(signal * (i + 1)), recipe, KERNELS) for i in range(2)]
    mapped = tf_idf_map(layers)
    for n, shown in zip(layers, mapped["layers"], strict=True):
        assert shown["silent"] == 1
        expected: dict[tuple[int, int], int] = {}
        for tf, idf in zip(n.tf, n.idf, strict=True):
            if tf:
                cell = tuple(sum(edge <= v for edge in mapped[a]) - 1 for a, v in (("tf", tf), ("idf", idf)))
                expected[cell] = expected.get(cell, 0) + 1
        assert {(i, j): count for i, j, count in shown["cells"]} == expected


def test_a_map_of_equal_neurons() -> None:
    (layer,) = tf_idf_map([neurons(0, [1.0, 1.0], [1.5, 1.5])])["layers"]
    assert [count for _, _, count in layer["cells"]] == [2]


def test_distributions_are_quantiles_over_neurons() -> None:
    shown = distributions([neurons(6, [float(i) for i in range(101)], [1.0] * 101)])
    assert shown["tf"] == [{"layer": 6, "quantiles": [5.0, 25.0, 50.0, 75.0, 95.0]}]
    assert shown["idf"][0]["quantiles"] == [1.0] * 5


def test_an_expert_stands_for_the_topic_in_which_it_adds_most(passages: Passages) -> None:
    digit = np.array([[c.isdigit() for c in characters(i)] for i in (0, 1)])
    rng = np.random.default_rng(0)
    kind = np.where(digit, 1.0, -1.0)[..., None] * np.array([1.0, 0, 0, 0])
    inputs = kind + 0.01 * rng.random((2, LENGTH, 4))
    gate = np.zeros((2, LENGTH, 3))
    gate[..., 0] = np.where(digit, 0.2, 0.9)  # Everywhere.
    gate[digit, 2] = 0.5
    norm = np.where(gate > 0, [2.0, 2.0, 3.0], 0)
    norm[1, 3, 2] = 9  # The first digit of the second text.
    rows = [expert_statistics(i, gate[i] > 0, gate[i], norm[i], inputs[i]) for i in (0, 1)]
    known = merge(rows)
    chosen = {"tfidf_mode": "topic", "tfidf_k": 2, "signal": "product", "nsamples": 2, "seqlen": LENGTH}
    shown = describe_experts(5, known, Recipe(method="neuronrank_tfidf", **chosen), KERNELS, passages, (1,))
    assert (shown["layer"], shown["groups"], shown["count"]) == (5, 2, 3)
    experts = {one["expert"]: one for one in shown["experts"]}
    assert [one["removed"] for one in (experts[0], experts[1], experts[2])] == [False, True, False]
    assert experts[1]["topics"] == experts[1]["passages"] == []
    [topic] = experts[2]["topics"]
    assert topic["tokens"] == digit.sum()
    assert topic["lift"] == pytest.approx(2)
    assert set(topic["words"]) == set("12345678")
    assert experts[2]["share"] == pytest.approx(digit.mean())
    assert experts[2]["passages"][0]["token"] == "1"
    assert experts[2]["passages"][0]["signal"] == pytest.approx(4.5)
    # Specialists first: the expert of one topic of two.
    assert [one["expert"] for one in shown["experts"]].index(2) < [one["expert"] for one in shown["experts"]].index(1)
    bare = describe_experts(5, known, Recipe(method="neuronrank_tfidf", **chosen), KERNELS, None)
    assert bare["experts"][0]["passages"] == bare["experts"][0]["topics"][0]["words"] == []
