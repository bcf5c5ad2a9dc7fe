"""Bad values of a recipe are refused by name, value and range."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from neuronrank_core import InvalidValueError, NeuronRankError, Recipe
from neuronrank_core.methods import check_recipe
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
WHOLE = {
    "pruning_last": 1,
    "tfidf_k": 1,
    "tokens_per_document": 1,
    "update_iterations": 1,
    "nsamples": 1,
    "seqlen": 2,
    "seed": 0,
}
CHOICES = {
    "method": "wanda",
    "compare": "row",
    "tfidf_mode": "topic",
    "signal": "product",
    "propagate": "dense",
    "update_target": "model",
    "bos": "text",
}
FLAGS = ("include_attention", "prune_lm_head")
OPTIONAL = {"sparsity_ratio", "pruning_last", "compare"} | set(vars(Exponents()))


def refused(field: str, value: object) -> None:
    # The recipe does not know which methods there are.
    make: Callable[..., object] = (lambda **given: check_recipe(Recipe(**given))) if field == "method" else Recipe
    with pytest.raises(InvalidValueError) as error:
        make(**{field: value})
    assert error.value.field == field
    assert error.value.allowed
    assert str(error.value) == f"{field} is {value!r}, allowed: {error.value.allowed}"
    assert isinstance(error.value, NeuronRankError)
    assert isinstance(error.value, ValueError)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("sparsity_ratio", 50, "did you mean 0.5?"),
        ("sparsity_ratio", 62.5, "did you mean 0.625?"),
        ("q_active", 60, "did you mean 0.6?"),
        ("q_active", 100, ""),
        ("sparsity_ratio", 1.5, ""),
        ("sparsity_ratio", 101, ""),
        ("sparsity_ratio", -50, ""),
        ("sparsity_ratio", "50", ""),
        ("weight_exp", 50, ""),
        ("tfidf_mode", "page", ""),
    ],
)
def test_a_percentage_in_place_of_a_fraction_gets_a_hint(field: str, value: object, hint: str) -> None:
    make: Callable[..., object] = Recipe
    with pytest.raises(InvalidValueError) as error:
        make(**{field: value})
    assert error.value.hint == hint


@pytest.mark.parametrize(
    "value", [math.nan, INF, -INF, 10**400, True, False, "0.5", [0.5], 1j], ids=lambda v: str(v)[:9]
)
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
            check_recipe(Recipe(**{field: value}))
        assert words in error.value.allowed
