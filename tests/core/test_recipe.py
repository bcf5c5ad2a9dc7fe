"""Recipes: explicit values beat presets, methods complete them, N:M fixes the share."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronrank_core import METHODS, PRESETS, InvalidValueError, Recipe
from neuronrank_core.methods import exponents, mode
from neuronrank_core.recipe import Exponents


@pytest.mark.parametrize(("pattern", "ratio"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.25), ("1:3", 1 / 3)])
def test_a_pattern_fixes_the_share(pattern: str, ratio: float) -> None:
    assert Recipe(sparsity_type=pattern).ratio == ratio
    assert Recipe(sparsity_type=pattern, sparsity_ratio=ratio).ratio == ratio
    for other in (0, 0.4, 1):
        with pytest.raises(InvalidValueError, match=f"sparsity_ratio is {other}, .* for {pattern}"):
            Recipe(sparsity_type=pattern, sparsity_ratio=other)


def test_the_share_is_a_half_unless_told_otherwise() -> None:
    assert Recipe().ratio == 0.5
    assert Recipe(sparsity_ratio=0).ratio == 0
    assert Recipe(sparsity_ratio=0.7).ratio == 0.7


@pytest.mark.parametrize("preset", PRESETS)
def test_explicit_values_beat_the_preset(preset: str) -> None:
    plain = Recipe.from_preset(preset)
    assert {name: getattr(plain, name) for name in PRESETS[preset]} == PRESETS[preset]
    changed = Recipe.from_preset(preset, idf_exp=0.25, method="wanda")
    assert changed.idf_exp == 0.25
    assert changed.method == "wanda"
    assert changed.tf_exp == PRESETS[preset]["tf_exp"]


def test_no_preset_and_an_unknown_one() -> None:
    assert Recipe.from_preset(tf_exp=2.0) == Recipe.from_preset(None, tf_exp=2.0) == Recipe(tf_exp=2.0)
    with pytest.raises(InvalidValueError, match=r"preset is 'bold', allowed: .*balanced"):
        Recipe.from_preset("bold")


@given(st.sampled_from(list(METHODS)), st.sampled_from(list(vars(Exponents()))), st.floats(0, 10))
def test_an_exponent_given_is_taken_and_one_left_open_is_the_methods(method: str, name: str, value: float) -> None:
    defaults = {**vars(Exponents()), **METHODS[method].defaults}
    assert vars(exponents(Recipe(method=method))) == defaults
    assert vars(exponents(Recipe(method=method, **{name: value}))) == {**defaults, name: value}


def test_defaults_of_the_specification() -> None:
    recipe = Recipe()
    assert (recipe.q_active, recipe.threshold, recipe.signal, recipe.tfidf_mode) == (0.6, 0, "gate", "doc")
    assert (recipe.tokens_per_document, recipe.propagate, recipe.bos) == (64, "pruned", "window")
    assert (recipe.magnitude_multi, recipe.variance_multi, recipe.variance_exp) == (0, 1, 1)
    assert (recipe.include_attention, recipe.prune_lm_head) == (False, False)
    main = exponents(Recipe(method="neuronrank_wanda"))
    assert (main.weight_exp, main.input_exp, main.tf_exp, main.idf_exp, main.spikiness_exp) == (1, 1, 0.5, 0, 0)


def test_the_first_form_counts_tokens_whatever_the_flag_says() -> None:
    assert mode(Recipe(method="neuronrank_old", tfidf_mode="topic")) == "token"
    assert mode(Recipe(method="neuronrank_tfidf", tfidf_mode="topic")) == "topic"


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().method = "wanda"
