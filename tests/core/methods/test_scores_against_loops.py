"""Every method's score of every module against plain loops, under many recipes."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import MODULES, random_layer

from neuronrank_core import METHODS, PRESETS, Recipe
from neuronrank_core.recipe import MODES, SIGNALS

#: The methods of the specification, which `oracle` computes in loops. A new method brings a test of its own.
ORACLES = (
    *("magnitude", "wanda", "ria", "dass"),
    *(f"neuronrank_{form}" for form in ("tfidf", "old", "unstructured", "wanda")),
)
exponent = st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.0])
signed = exponent | st.just(-1.0)


def agrees(recipe: Recipe, seed: int = 0) -> None:
    layer = random_layer(seed)
    context = layer.context(recipe)
    for module in MODULES:
        score = METHODS[recipe.method].score(module, context)
        assert score.shape == layer.weights[module].shape
        assert score == pytest.approx(np.array(oracle.score(layer, recipe, module)), rel=1e-5, abs=0)


@pytest.mark.parametrize("method", ORACLES)
def test_defaults(method: str) -> None:
    agrees(Recipe(method=method))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", ORACLES)
def test_presets(method: str, preset: str) -> None:
    agrees(Recipe.from_preset(preset, method=method))


@given(
    st.sampled_from(["neuronrank_tfidf", "neuronrank_old", "neuronrank_wanda"]),
    st.integers(0, 5),
    st.fixed_dictionaries(
        {
            "tfidf_mode": st.sampled_from(MODES),
            "tfidf_k": st.integers(1, 6),
            "q_active": st.sampled_from([0.3, 0.5, 0.6, 0.85]),
            "signal": st.sampled_from(SIGNALS),
            "threshold": st.sampled_from([-0.5, 0.0, 1.0]),
            "tokens_per_document": st.sampled_from([2, 5, 64]),
            "seed": st.integers(0, 3),
            "weight_exp": exponent,
            "input_exp": exponent,
            "tf_exp": exponent,
            "idf_exp": signed,
            "spikiness_exp": signed,
        }
    ),
)
def test_the_seed_formula_and_its_heirs(method: str, seed: int, fields: dict) -> None:
    agrees(Recipe(method=method, **fields), seed)


@given(
    st.integers(0, 5),
    st.fixed_dictionaries(
        {
            "signal": st.sampled_from(SIGNALS),
            "weight_exp": exponent,
            "magnitude_multi": st.sampled_from([0.0, 1.0, 3.0]),
            "variance_multi": st.sampled_from([0.0, 1.0, 0.5]),
            "variance_exp": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
            "token_weight": st.sampled_from([0.0, 0.5, 1.0]),
        }
    ),
)
def test_variance_weighted_magnitude(seed: int, fields: dict) -> None:
    agrees(Recipe(method="neuronrank_unstructured", **fields), seed)


@pytest.mark.parametrize(
    ("method", "gate", "down"),
    [
        ("magnitude", "module", "module"),
        ("wanda", "row", "row"),
        ("neuronrank_tfidf", "module", "module"),
        ("neuronrank_old", "module", "module"),
        ("neuronrank_unstructured", "module", "module"),
        ("neuronrank_wanda", "module", "row"),
        ("ria", "row", "row"),
        ("dass", "column", "row"),
    ],
)
def test_comparison_groups(method: str, gate: str, down: str) -> None:
    assert [METHODS[method].compare(module) for module in MODULES] == [gate, gate, down]
