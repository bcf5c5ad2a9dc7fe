"""Recipes: bad values are refused by name, value and range; explicit values beat presets; N:M fixes the share."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronrank_core import METHODS, PRESETS, InvalidValueError, NeuronRankError, Recipe
from neuronrank_core.recipe import Exponents

INF = math.inf
#: Allowed values of the numbers: lowest, highest.
REAL = {
    "sparsity_ratio": (0, 1),
    "threshold": (-INF, INF),
    "weight_exp": (0, 10),
    "input_exp": (0, 10),
    "tf_exp": (0, 10),
    "idf_exp": (-10, 10),
    "spikiness_exp": (-10, 10),
    "magnitude_multi": (0, INF),
    "variance_multi": (0, INF),
    "variance_exp": (0, 10),
    "token_weight": (0, INF),
}
WHOLE = {"pruning_last": 1, "tfidf_k": 1, "tokens_per_document": 1, "nsamples": 1, "seqlen": 2, "seed": 0}
CHOICES = {
    "method": "wanda",
    "compare": "row",
    "tfidf_mode": "topic",
    "signal": "product",
    "propagate": "dense",
    "bos": "text",
}
FLAGS = ("include_attention", "prune_lm_head")
OPTIONAL = {"sparsity_ratio", "pruning_last", "compare"} | set(vars(Exponents()))


def refused(field: str, value: object) -> None:
    with pytest.raises(InvalidValueError) as error:
        Recipe(**{field: value})
    assert error.value.field == field
    assert error.value.allowed
    assert str(error.value) == f"{field} is {value!r}, allowed: {error.value.allowed}"
    assert isinstance(error.value, NeuronRankError)
    assert isinstance(error.value, ValueError)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("value", [math.nan, INF, -INF, True, False, "0.5", [0.5], 1j], ids=repr)
@pytest.mark.parametrize("field", [*REAL, "q_active", *WHOLE])
def test_what_is_no_finite_number_is_refused(field: str, value: object) -> None:
    refused(field, value)


@pytest.mark.parametrize(("field", "limits"), REAL.items())
def test_the_ends_are_allowed_and_nothing_beyond(field: str, limits: tuple[float, float]) -> None:
    for end, beyond in zip(limits, (-INF, INF), strict=True):
        if math.isfinite(end):
            assert getattr(Recipe(**{field: end}), field) == end
            refused(field, math.nextafter(end, beyond))


@pytest.mark.parametrize(("field", "low"), WHOLE.items())
def test_whole_numbers(field: str, low: int) -> None:
    assert getattr(Recipe(**{field: low}), field) == low
    refused(field, low - 1)
    refused(field, low + 0.5)
    refused(field, float(low))


@pytest.mark.parametrize("q", [0, 1, 0.0, 1.0, -0.1, 1.5])
def test_q_lies_between_its_ends(q: float) -> None:
    refused("q_active", q)


@pytest.mark.parametrize(("field", "good"), CHOICES.items())
def test_choices(field: str, good: str) -> None:
    assert getattr(Recipe(**{field: good}), field) == good
    for bad in (good.upper(), "", 1, True, [good]):
        refused(field, bad)


@pytest.mark.parametrize("field", FLAGS)
def test_flags(field: str) -> None:
    for bad in (0, 1, "yes", None):
        refused(field, bad)


@pytest.mark.parametrize("field", [*REAL, "q_active", *WHOLE, *CHOICES])
def test_none_leaves_optional_fields_open_and_no_others(field: str) -> None:
    if field in OPTIONAL:
        assert getattr(Recipe(**{field: None}), field) is None
    else:
        refused(field, None)


@pytest.mark.parametrize("value", ["", "structured", "4:2", "2:4:8", 24, None, True, ["2:4"]], ids=repr)
def test_sparsity_types_are_checked(value: object) -> None:
    refused("sparsity_type", value)


def test_the_range_is_told_in_words() -> None:
    for field, value, words in [
        ("sparsity_ratio", 2.0, "a number in [0, 1]"),
        ("q_active", 1.0, "a number in (0, 1)"),
        ("tfidf_k", 0, "a whole number in [1, inf]"),
        ("include_attention", "yes", "true or false"),
        ("method", "neuronrank", "neuronrank_tfidf"),
        ("sparsity_type", "2/4", "N:M"),
    ]:
        with pytest.raises(InvalidValueError) as error:
            Recipe(**{field: value})
        assert words in error.value.allowed


@pytest.mark.parametrize(("pattern", "ratio"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.25), ("1:3", 1 / 3)])
def test_a_pattern_fixes_the_share(pattern: str, ratio: float) -> None:
    assert Recipe(sparsity_type=pattern).ratio == ratio
    assert Recipe(sparsity_type=pattern, sparsity_ratio=ratio).ratio == ratio
    for other in (0, 0.4, 1):
        with pytest.raises(InvalidValueError, match=f"sparsity_ratio is {other}, .* which {pattern} fixes"):
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
    assert vars(Recipe(method=method).exponents) == defaults
    assert vars(Recipe(method=method, **{name: value}).exponents) == {**defaults, name: value}


def test_defaults_of_the_specification() -> None:
    recipe = Recipe()
    assert (recipe.q_active, recipe.threshold, recipe.signal, recipe.tfidf_mode) == (0.6, 0, "gate", "doc")
    assert (recipe.tokens_per_document, recipe.propagate, recipe.bos) == (64, "pruned", "window")
    assert (recipe.magnitude_multi, recipe.variance_multi, recipe.variance_exp) == (1, 1, 1)
    assert (recipe.include_attention, recipe.prune_lm_head) == (False, False)
    main = Recipe(method="neuronrank_wanda").exponents
    assert (main.weight_exp, main.input_exp, main.tf_exp, main.idf_exp, main.spikiness_exp) == (1, 1, 0.5, 0, 0)


def test_the_first_form_counts_tokens_whatever_the_flag_says() -> None:
    assert Recipe(method="neuronrank_old", tfidf_mode="topic").mode == "token"
    assert Recipe(method="neuronrank_tfidf", tfidf_mode="topic").mode == "topic"


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().method = "wanda"
