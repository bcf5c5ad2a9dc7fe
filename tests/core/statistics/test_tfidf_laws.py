"""What must hold of TF, DF, IDF, spikiness and variance on any corpus, in every mode."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import ragged, random_row, seeds

from neuronrank_core import LayerStatistics, NeuronStatistics, Recipe, document_statistics, merge
from neuronrank_core.recipe import MODES
from neuronrank_core.statistics import tfidf

qs = st.floats(0.01, 0.99)


@st.composite
def tables(draw: st.DrawFn) -> LayerStatistics:
    """Tables of a ragged corpus with ties and silent neurons."""
    rng = np.random.default_rng(draw(seeds))
    return merge(random_row(rng, i, n, tokens_per_document=6) for i, n in enumerate(draw(ragged)))


@given(tables(), st.sampled_from(MODES), qs, st.integers(1, 6))
def test_df_never_exceeds_the_groups_and_idf_stays_in_its_bounds(
    table: LayerStatistics, mode: str, q: float, k: int
) -> None:
    k = min(k, len(table.sample))
    neurons = NeuronStatistics(table, Recipe(tfidf_mode=mode, q_active=q, tfidf_k=k))
    most = {"doc": len(table.document), "topic": k, "token": table.tokens.sum()}[mode]
    assert 1 <= neurons.groups <= most
    assert np.all(neurons.df >= 0)
    assert np.all(neurons.df <= neurons.groups)
    assert np.all(neurons.idf >= 1)
    assert np.all(neurons.idf <= np.log(neurons.groups + 1) + 1)
    assert np.all(neurons.tf >= 0)


@given(tables(), st.integers(1, 6))
def test_empty_topics_are_not_groups(table: LayerStatistics, k: int) -> None:
    neurons = NeuronStatistics(table, Recipe(tfidf_mode="topic", tfidf_k=min(k, len(table.sample))))
    assert sorted(set(neurons.labels.tolist())) == list(range(neurons.groups))


@given(st.integers(1, 200))
def test_idf_falls_as_df_rises(groups: int) -> None:
    idf = tfidf.inverse_document_frequency(np.arange(groups + 1), groups)
    assert np.all(np.diff(idf) < 0)
    assert idf[-1] == 1
    assert idf[0] == np.log(groups + 1) + 1


@given(tables(), qs, qs)
def test_a_higher_q_is_stricter_about_strength(table: LayerStatistics, one: float, other: float) -> None:
    low, high = sorted((one, other))
    mild, strict = (tfidf.quantile_threshold(table.sample, q) for q in (low, high))
    assert np.all(mild <= strict)
    labels, groups = table.sample_documents(), len(table.document)
    active = [tfidf.active_tokens(table.sample, tau, labels, groups) for tau in (mild, strict)]
    assert np.all(active[0] >= active[1])
    # ... and milder about how many tokens must reach it.
    df = [tfidf.document_frequency(active[1], table.sample_tokens, q) for q in (low, high)]
    assert np.all(df[0] <= df[1])


@given(tables(), qs)
def test_df_sees_the_order_of_signals_alone(table: LayerStatistics, q: float) -> None:
    # Any strictly increasing map of the signal, another for each neuron, leaves DF as it is.
    bent = (np.arange(1, 6) * table.sample**3 + np.arange(5)).astype(np.float32)
    labels, groups = table.sample_documents(), len(table.document)
    df = [
        tfidf.document_frequency(
            tfidf.active_tokens(a, tfidf.quantile_threshold(a, q), labels, groups), table.sample_tokens, q
        )
        for a in (table.sample, bent)
    ]
    assert np.array_equal(*df)


@given(tables(), st.sampled_from(MODES))
def test_neurons_do_not_see_each_other(table: LayerStatistics, mode: str) -> None:
    order = [3, 0, 4, 2, 1]
    columns = {n: c[:, order] if c.ndim == 2 and c.shape[1] == 5 else c for n, c in table.columns().items()}
    recipe = Recipe(tfidf_mode=mode, tfidf_k=1)
    straight, shuffled = (NeuronStatistics(t, recipe) for t in (table, LayerStatistics.from_columns(columns)))
    for name in ("tf", "df", "idf", "spikiness", "variance"):
        assert getattr(straight, name)[order] == pytest.approx(getattr(shuffled, name), rel=1e-12)


@given(tables(), st.floats(0, 5))
def test_law_of_total_variance(table: LayerStatistics, weight: float) -> None:
    def variance(w: float) -> np.ndarray:
        return tfidf.signal_variance(table.signal_mean, table.signal_mean_square, table.tokens, token_weight=w)

    mean = tfidf.term_frequency(table.signal_mean, table.tokens)
    total = tfidf.over_documents(table.signal_mean_square, table.tokens) - mean**2
    assert variance(1.0) == pytest.approx(total, rel=1e-5, abs=1e-5)
    assert np.all(variance(0.0) >= 0)
    assert variance(weight) == pytest.approx((1 - weight) * variance(0.0) + weight * variance(1.0), abs=1e-9)


@given(seeds, ragged)
def test_total_variance_is_that_of_all_tokens(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    documents = [rng.exponential(size=(n, 3)) for n in lengths]
    table = merge(document_statistics(i, signal=a) for i, a in enumerate(documents))
    variance = NeuronStatistics(table, Recipe(token_weight=1.0)).variance
    assert variance == pytest.approx(np.var(np.concatenate(documents), axis=0), rel=1e-5, abs=1e-6)


@given(seeds, ragged)
def test_a_peak_is_no_lower_than_the_mean(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    flat, spiky = np.float32(rng.exponential()), rng.exponential(size=sum(lengths))
    signal = np.stack([np.full(sum(lengths), flat), spiky], axis=1)
    documents = np.split(signal, np.cumsum(lengths)[:-1])
    spikiness = NeuronStatistics(
        merge(document_statistics(i, signal=a) for i, a in enumerate(documents)), Recipe()
    ).spikiness
    assert np.all(spikiness >= 1 - 1e-6)
    assert spikiness[0] == pytest.approx(1, rel=1e-6)
    assert spikiness[1] == pytest.approx(spiky.max() / spiky.mean(), rel=1e-6)
