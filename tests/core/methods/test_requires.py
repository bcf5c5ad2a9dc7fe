"""A method needs the statistics it says it needs, and no others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import MODULES, random_layer

from neuronrank_core import METHODS, LayerStatistics, MissingStatisticsError, Recipe, ScoringContext
from neuronrank_core.methods import requires
from neuronrank_core.recipe import MODES
from neuronrank_core.statistics.table import INPUTS, SAMPLE, SIGNAL

COLUMNS = {
    INPUTS: {"input_mean_square.gate_proj", "input_mean_square.down_proj", "input_mean_square.q_proj"},
    SIGNAL: {"signal_mean", "signal_mean_square", "signal_max", "open_gate"},
    SAMPLE: {"sample", "sample_tokens"},
}
exponent = st.none() | st.sampled_from([0.0, 1.0])


def stripped(table: LayerStatistics, kinds: frozenset[str]) -> LayerStatistics:
    kept = {"document", "tokens"}.union(*(COLUMNS[kind] for kind in kinds))
    return LayerStatistics.from_columns({name: c for name, c in table.columns().items() if name in kept})


@given(
    st.sampled_from(list(METHODS)),
    st.sampled_from(MODES),
    st.fixed_dictionaries(dict.fromkeys(("weight_exp", "input_exp", "tf_exp", "idf_exp", "spikiness_exp"), exponent)),
)
def test_what_is_required_is_enough(method: str, mode: str, exponents: dict) -> None:
    recipe, layer = Recipe(method=method, tfidf_mode=mode, tfidf_k=3, **exponents), random_layer()
    table = layer.collect(recipe)
    few = stripped(table, requires(recipe)) if requires(recipe) else None
    for module in MODULES:
        lean = METHODS[method].score(module, ScoringContext(0, recipe, layer.weights, few))
        assert np.array_equal(lean, METHODS[method].score(module, layer.context(recipe, table)))


OFF = {"tf_exp": 0.0, "idf_exp": 0.0}


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({"method": "magnitude"}, set()),
        ({"method": "magnitude", "include_attention": True}, set()),
        ({"method": "wanda"}, {INPUTS}),
        ({"method": "neuronrank_unstructured"}, {SIGNAL}),
        ({"method": "neuronrank_wanda"}, {INPUTS}),
        ({"method": "neuronrank_wanda", "tfidf_mode": "topic"}, {INPUTS}),
        ({"method": "neuronrank_wanda", "idf_exp": 1.0}, {INPUTS, SAMPLE}),
        ({"method": "neuronrank_wanda", "idf_exp": 1.0, "tfidf_mode": "token"}, {INPUTS, SIGNAL}),
        ({"method": "neuronrank_wanda", "spikiness_exp": 1.0}, {INPUTS, SIGNAL}),
        ({"method": "neuronrank_tfidf", **OFF}, set()),
        ({"method": "neuronrank_tfidf", **OFF, "include_attention": True}, {INPUTS}),
        ({"method": "neuronrank_tfidf", **OFF, "prune_lm_head": True}, {INPUTS}),
        ({"method": "neuronrank_tfidf", **OFF, "input_exp": 1.0}, {INPUTS}),
        ({"method": "neuronrank_tfidf", **OFF, "tf_exp": 1.0}, {SIGNAL}),
        ({"method": "neuronrank_tfidf", **OFF, "idf_exp": 1.0}, {SAMPLE}),
        ({"method": "neuronrank_tfidf", **OFF, "idf_exp": 1.0, "tfidf_mode": "token"}, {SIGNAL}),
        ({"method": "neuronrank_tfidf"}, {SIGNAL, SAMPLE}),
        ({"method": "neuronrank_old"}, {SIGNAL}),
        ({"method": "neuronrank_old", **OFF}, set()),
    ],
)
def test_exponents_of_zero_need_no_statistics(fields: dict, kinds: set[str]) -> None:
    assert requires(Recipe(**fields)) == kinds


@pytest.mark.parametrize("kind", [SIGNAL, SAMPLE])
def test_what_is_missing_is_named(kind: str) -> None:
    layer, recipe = random_layer(), Recipe(method="neuronrank_tfidf")
    table = stripped(layer.collect(recipe), frozenset({INPUTS, SIGNAL, SAMPLE}) - {kind})
    with pytest.raises(MissingStatisticsError, match="No TF-IDF statistics for layer 3: no column s"):
        METHODS["neuronrank_tfidf"].score("gate_proj", layer.context(recipe, table))
