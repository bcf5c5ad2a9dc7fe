"""Experts as terms: rows, frequency, REAP, TF and IDF against plain loops and by hand; which experts go."""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pytest

from neuronrank_core import (
    AllZeroMetricError,
    InputError,
    InvalidValueError,
    LayerStatistics,
    NonFiniteError,
    Recipe,
    ScoringContext,
    load_statistics,
    merge,
    save_statistics,
)
from neuronrank_core.methods import ALL_METHODS, check_recipe, exponents, method_of, requires, without_effect
from neuronrank_core.selection.experts import kept_experts, removed_experts
from neuronrank_core.statistics.experts import active_documents, expert_statistics
from neuronrank_core.statistics.table import EXPERTS, INPUTS, SAMPLE

EXPERT_COUNT, HIDDEN, LENGTHS = 6, 5, (9, 4, 13, 7)
SUMS = ("expert_gate", "expert_norm", "expert_gated_norm")
Document = list[tuple[list[float], dict[int, tuple[float, float]]]]


def random_documents(seed: int = 0) -> list[Document]:
    """Tokens as (input, {expert: (gate, norm)}); two experts each, some experts at home in some documents."""
    rng = np.random.default_rng(seed)
    corpus = []
    for number, length in enumerate(LENGTHS):
        liking = np.exp(-abs(np.arange(EXPERT_COUNT - 1) - number))  # The last expert is never chosen.
        tokens = []
        for _ in range(length):
            pair = rng.choice(EXPERT_COUNT - 1, 2, replace=False, p=liking / liking.sum())
            gates = rng.dirichlet([1, 1])
            does = {int(e): (float(g), float(rng.gamma(2))) for e, g in zip(pair, gates, strict=True)}
            tokens.append((rng.normal(size=HIDDEN).tolist(), does))
        corpus.append(tokens)
    return corpus


def row(number: int, document: Document, **options: Any) -> LayerStatistics:
    routed, gate, norm = (np.zeros((len(document), EXPERT_COUNT)) for _ in range(3))
    for t, (_, does) in enumerate(document):
        for e, (g, n) in does.items():
            routed[t, e], gate[t, e], norm[t, e] = 1, g, n
    return expert_statistics(number, routed, gate, norm, [x for x, _ in document], **options)


def table(corpus: list[Document], **options: Any) -> LayerStatistics:
    return merge([row(number, document, **options) for number, document in enumerate(corpus)])


def context(corpus: list[Document], **chosen: Any) -> ScoringContext:
    recipe = Recipe(**{"sparsity_type": "experts", "sparsity_ratio": 0.5, "tfidf_k": 3, **chosen})
    check_recipe(recipe)
    return ScoringContext(0, recipe, {}, table(corpus), experts=EXPERT_COUNT)


def score(corpus: list[Document], method: str, **chosen: Any) -> list[float]:
    return [float(s) for s in ALL_METHODS[method].expert_score(context(corpus, method=method, **chosen))]


def at_expert(corpus: list[Document], e: int) -> list[tuple[float, float]]:
    """Gate and norm at every token of the corpus that is routed to an expert."""
    return [does[e] for document in corpus for _, does in document if e in does]


def test_a_row_holds_sums_over_the_routed_tokens() -> None:
    document = random_documents()[2]
    found = row(7, document)
    for e in range(EXPERT_COUNT):
        own = at_expert([document], e)
        assert found.expert_tokens is not None
        assert found.expert_tokens[0, e] == len(own)
        for name, terms in zip(SUMS, ([g for g, _ in own], [n for _, n in own], [g * n for g, n in own]), strict=True):
            assert found.columns()[name][0, e] == pytest.approx(sum(terms), rel=1e-6)
    assert (found.document.tolist(), found.tokens.tolist()) == ([7], [13])


def test_samples_are_inputs_gates_and_norms_of_the_same_tokens() -> None:
    document = random_documents()[2]
    found = row(0, document, tokens_per_document=4)
    for i, t in enumerate((0, 3, 6, 9)):
        x, does = document[t]
        assert found.columns()["sample"][i].tolist() == pytest.approx(x)
        for e in range(EXPERT_COUNT):
            gate, norm = does.get(e, (0, 0))
            assert found.columns()["sample_gate"][i, e] == pytest.approx(gate)
            assert found.columns()["sample_norm"][i, e] == pytest.approx(norm)


def test_merging_in_any_order_and_files_keep_every_column(tmp_path: Any) -> None:
    rows = [row(number, document, tokens_per_document=5) for number, document in enumerate(random_documents())]
    whole, other = merge(rows), merge([merge([rows[3], rows[1]]), merge([rows[2], rows[0]])])
    save_statistics(tmp_path / "t.safetensors", whole)
    loaded, _ = load_statistics(tmp_path / "t.safetensors")
    sums, _ = load_statistics(tmp_path / "t.safetensors", {EXPERTS})
    for name, column in whole.columns().items():
        assert np.array_equal(column, other.columns()[name])
        assert np.array_equal(column, loaded.columns()[name])
    assert sums.columns().keys() == {"document", "tokens", "expert_tokens", *SUMS}
    assert load_statistics(tmp_path / "t.safetensors", {INPUTS})[0].columns().keys() == {"document", "tokens"}


def test_reap_and_frequency_against_loops() -> None:
    corpus = random_documents()
    for e, (reap, frequency) in enumerate(zip(score(corpus, "reap"), score(corpus, "expert_frequency"), strict=True)):
        own = at_expert(corpus, e)
        assert reap == pytest.approx(sum(g * n for g, n in own) / len(own) if own else 0, rel=1e-6)
        assert frequency == pytest.approx(len(own) / sum(LENGTHS))


@pytest.mark.parametrize("signal", ["gate", "activated", "product"])
@pytest.mark.parametrize(("tf_exp", "idf_exp"), [(1.0, 1.0), (0.5, -2.0), (1.0, 0.0), (0.0, 1.0)])
def test_tf_idf_over_documents_against_loops(signal: str, tf_exp: float, idf_exp: float) -> None:
    corpus = random_documents()
    found = score(corpus, "neuronrank_tfidf", signal=signal, tf_exp=tf_exp, idf_exp=idf_exp)
    routed = 2 * sum(LENGTHS)
    for e in range(EXPERT_COUNT):
        own = at_expert(corpus, e)
        tf = sum({"gate": g, "activated": n, "product": g * n}[signal] for g, n in own) / sum(LENGTHS)
        df = sum(len(at_expert([d], e)) / (2 * len(d)) >= len(own) / routed - 1e-12 for d in corpus)
        idf = log((len(corpus) + 1) / (df + 1)) + 1
        assert found[e] == pytest.approx(tf**tf_exp * idf**idf_exp, rel=1e-6)


@pytest.mark.parametrize(
    ("chosen", "tf_exp", "idf_exp"),
    [
        ({"method": "neuronrank_tfidf", "tfidf_mode": "topic", "signal": "product"}, 1, 1),
        # The main method takes the product and topics, whatever signal and mode are chosen for others.
        ({"method": "neuronrank_wanda"}, 0.5, 0.5),
        ({"method": "neuronrank_wanda", "tf_exp": 1.0, "idf_exp": 0.0, "signal": "activated"}, 1, 0),
    ],
)
def test_tf_idf_over_topics_against_loops(chosen: dict[str, Any], tf_exp: float, idf_exp: float) -> None:
    """Two kinds of input, which the clustering tells apart; documents mix both."""
    rng, corpus = np.random.default_rng(1), []
    for document in random_documents(3):
        kinds = rng.integers(0, 2, len(document))
        kinds[:2] = 0, 1
        corpus.append(
            [([50.0 * (k == 0), 50.0 * (k == 1), *x[2:]], does) for k, (x, does) in zip(kinds, document, strict=True)]
        )
    found = score(corpus, **chosen, tfidf_k=2, seed=1)
    by_topic = [[token for d in corpus for token in d if token[0][k] > 25] for k in (0, 1)]
    routed = 2 * sum(LENGTHS)
    for e in range(EXPERT_COUNT):
        means = [sum(g * n for g, n in at_expert([topic], e)) / len(topic) for topic in by_topic]
        share = len(at_expert(corpus, e)) / routed
        df = sum(len(at_expert([topic], e)) / (2 * len(topic)) >= share - 1e-12 for topic in by_topic)
        idf = log(3 / (df + 1)) + 1
        assert found[e] == pytest.approx((sum(means) / 2) ** tf_exp * idf**idf_exp, rel=1e-5)


def test_tf_idf_over_tokens_counts_routed_tokens() -> None:
    corpus = random_documents()
    found = score(corpus, "neuronrank_tfidf", tfidf_mode="token", tf_exp=0)
    for e in range(EXPERT_COUNT):
        assert found[e] == pytest.approx(log((sum(LENGTHS) + 1) / (len(at_expert(corpus, e)) + 1)) + 1)


def test_the_main_method_needs_a_sample_and_takes_no_mode() -> None:
    main, weights = Recipe(sparsity_type="experts"), Recipe()
    assert requires(main) == requires(replace(main, idf_exp=0.0)) == {EXPERTS, SAMPLE}
    assert exponents(weights).idf_exp == 0
    assert {"tfidf_mode", "signal"} <= set(without_effect(main, {"tfidf_mode", "signal", "tfidf_k"}))
    assert not without_effect(main, {"tfidf_k", "idf_exp", "tf_exp"})


def test_idf_differs_between_experts() -> None:
    """By hand: a generalist in all three documents, a specialist in one, another in two; and one never chosen."""
    counts = [[10, 0, 10, 0], [10, 0, 10, 0], [10, 15, 5, 0]]
    # Shares of the corpus: 30/70, 15/70, 25/70, 0. Those of the third document: 1/3, 1/2, 1/6, 0.
    assert active_documents(counts).tolist() == [
        [True, False, True, True],
        [True, False, True, True],
        [False, True, False, True],
    ]
    one = {0: (1.0, 1.0)}
    corpus: list[Document] = []
    for document in counts:
        experts = [e for e, n in enumerate(document) for _ in range(n)]
        corpus.append([([0.0] * HIDDEN, {e: one[0]}) for e in experts])
    idf = score(corpus, "neuronrank_tfidf", tf_exp=0)[:4]
    assert idf == pytest.approx([log(4 / 3) + 1, log(4 / 2) + 1, log(4 / 3) + 1, 1])


def test_a_share_equal_to_the_corpus_is_active_whatever_the_rounding() -> None:
    assert active_documents([[3, 7], [3 * 7, 7 * 7], [3 * 10**8, 7 * 10**8]]).all()


def test_what_is_not_finite_is_an_error() -> None:
    document = random_documents()[0]
    document[3] = (document[3][0], {1: (1.0, float("inf"))})
    with pytest.raises(NonFiniteError, match="experts of layer 4"):
        row(0, document, layer=4)


def test_the_lowest_go_and_the_first_of_a_tie() -> None:
    uses = [3, 1, 2, 1, 5, 4]
    corpus: list[Document] = [[([0.0] * HIDDEN, {e: (1.0, 1.0)}) for e, n in enumerate(uses) for _ in range(n)]]
    how = {"method": "expert_frequency"}
    assert kept_experts(context(corpus, **how, sparsity_ratio=0.34)).tolist() == [0, 2, 4, 5]
    assert kept_experts(context(corpus, **how, sparsity_ratio=0.17)).tolist() == [0, 2, 3, 4, 5]
    # As many of each group: 0 to 2, and 3 to 5.
    assert kept_experts(context(corpus, **how, sparsity_ratio=0.67), groups=2).tolist() == [0, 4]
    assert kept_experts(context(corpus, **how, sparsity_ratio=0.5), groups=3).tolist() == [0, 2, 4]


def test_experts_that_nothing_reaches_are_an_error() -> None:
    corpus: list[Document] = [[([0.0] * HIDDEN, {0: (0.0, 0.0)})]]
    with pytest.raises(AllZeroMetricError, match="layer 0 experts"):
        kept_experts(context(corpus, method="reap"))


@pytest.mark.parametrize(
    ("experts", "groups", "ratio", "goes"), [(8, 1, 0.25, 2), (8, 2, 0.3, 2), (8, 4, 0.5, 4), (60, 1, 0.5, 30)]
)
def test_how_many_go(experts: int, groups: int, ratio: float, goes: int) -> None:
    assert removed_experts(experts, groups, Recipe(sparsity_type="experts", sparsity_ratio=ratio)) == goes


def test_a_ratio_that_removes_none_is_an_error() -> None:
    with pytest.raises(InvalidValueError, match=r"at least 0\.25 and below 1, to remove one of 8 experts in 2 groups"):
        removed_experts(8, 2, Recipe(sparsity_type="experts", sparsity_ratio=0.2))


def test_random_depends_on_seed_and_layer_alone() -> None:
    corpus = random_documents()
    assert score(corpus, "random", seed=3) == score(random_documents(5), "random", seed=3)
    assert score(corpus, "random", seed=3) != score(corpus, "random", seed=4)
    one = context(corpus, method="random")
    other = ScoringContext(1, one.recipe, {}, None, experts=EXPERT_COUNT)
    assert ALL_METHODS["random"].expert_score(one).tolist() != ALL_METHODS["random"].expert_score(other).tolist()


@pytest.mark.parametrize("method", [name for name, method in ALL_METHODS.items() if method.ranks_experts])
@pytest.mark.parametrize("mode", ["doc", "topic", "token"])
def test_what_is_required_is_enough_and_what_has_no_effect_has_none(method: str, mode: str) -> None:
    corpus = random_documents()
    for chosen in ({}, {"idf_exp": 0.0}, {"tf_exp": 0.0, "idf_exp": 2.0}):
        one = context(corpus, method=method, tfidf_mode=mode, **chosen)
        columns = one.table.columns()
        needed = requires(one.recipe)
        own = {n for n in columns if n.startswith("sample") <= (SAMPLE in needed)}
        own -= set() if EXPERTS in needed else {"expert_tokens", *SUMS}
        lean = LayerStatistics.from_columns({name: columns[name] for name in own})
        found = method_of(one.recipe).expert_score(one).tolist()
        few = ScoringContext(0, one.recipe, {}, lean, experts=EXPERT_COUNT)
        assert method_of(one.recipe).expert_score(few).tolist() == found
        values = {"tfidf_mode": "token", "tfidf_k": 2, "q_active": 0.9, "signal": "activated", "threshold": 9.0}
        values |= {"tf_exp": 3.0, "idf_exp": 3.0, "weight_exp": 2.0, "input_exp": 2.0}
        for name, value in values.items():
            if getattr(one.recipe, name) == value:
                continue
            other = context(corpus, **{"method": method, "tfidf_mode": mode, **chosen, name: value})
            same = method_of(other.recipe).expert_score(other).tolist() == found
            if without_effect(one.recipe, [name]):
                assert same, name


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"method": "wanda"}, "method is 'wanda', allowed: with sparsity_type experts, one of "),
        ({"method": "neuronrank_tfidf", "spikiness_exp": 1.0}, r"spikiness_exp is 1.0, allowed: 0 with"),
        ({"update": "least-squares"}, "update is 'least-squares', allowed: none with sparsity_type experts"),
        ({"update": "gradual"}, "update is 'gradual', allowed: none with sparsity_type experts"),
        ({"propagate": "dense"}, "propagate is 'dense', allowed: pruned"),
        ({"sparsity_ratio": 1.0}, "sparsity_ratio is 1.0, allowed: below 1"),
        ({"pruning_last": 1}, "pruning_last is 1, allowed: unset"),
        ({"method": "reap", "sparsity_type": "unstructured"}, "method is 'reap', allowed: with sparsity_type unstr"),
        ({"method": "reap", "sparsity_type": "neurons"}, "method is 'reap', allowed: with sparsity_type neurons"),
    ],
)
def test_what_cannot_be_done_is_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        check_recipe(Recipe(**{"sparsity_type": "experts", "method": "reap", **chosen}))


def test_methods_without_a_score_say_so() -> None:
    corpus = random_documents()
    with pytest.raises(InputError, match="magnitude has no score for experts"):
        ALL_METHODS["magnitude"].expert_score(context(corpus, method="reap"))
    with pytest.raises(InputError, match="reap scores whole experts only"):
        ALL_METHODS["reap"].score("gate_proj", context(corpus, method="reap"))


@pytest.mark.parametrize("short", range(4))
def test_arrays_of_other_lengths_are_refused(short: int) -> None:
    routed, gate, norm, x = (np.ones((5 - (i == short), 2)) for i in range(4))
    with pytest.raises(InvalidValueError, match=r"tokens is .*, allowed: one number for all arrays"):
        expert_statistics(0, routed, gate, norm, x)
