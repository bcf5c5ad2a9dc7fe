"""Every field of the recipe does what its method says: those it reads matter, the others do not."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import MODULES, random_layer

from neuronrank_core import METHODS, NeuronRankError, Recipe, prune_mask
from neuronrank_core.methods import without_effect
from neuronrank_core.recipe import MODES

#: Two values of every field that must lead to different outcomes where the field is read.
VALUES = {
    "sparsity_type": ("unstructured", "2:4"),
    "sparsity_ratio": (None, 0.25),
    "multiple_of": (None, 2),
    "divisible_by": (1, 2),
    "compare": ("module", "row"),
    "pruning_last": (None, 1),
    "include_attention": (False, True),
    "prune_lm_head": (False, True),
    "tfidf_mode": ("doc", "topic"),
    "tfidf_k": (2, 4),
    "q_active": (0.6, 0.8),
    "signal": ("gate", "product"),
    "threshold": (0.0, 1.0),
    "tokens_per_document": (64, 2),
    "weight_exp": (1.0, 2.0),
    "input_exp": (0.0, 1.0),
    "tf_exp": (1.0, 0.5),
    "idf_exp": (1.0, 3.0),
    "spikiness_exp": (0.5, 2.0),
    "magnitude_multi": (1.0, 2.0),
    "variance_multi": (1.0, 2.0),
    "variance_exp": (1.0, 2.0),
    "token_weight": (0.0, 1.0),
    "update": ("least-squares", "gradual"),
    "update_iterations": (16, 4),
    "update_target": ("layer", "model"),
    "propagate": ("pruned", "dense"),
    "allocate": ("uniform", "modules"),
    "nsamples": (128, 4),
    "seqlen": (512, 8),
    "bos": ("window", "text"),
    "seed": (0, 1),
}
#: What has to be chosen for a field to matter.
SETTING = {"tfidf_k": {"tfidf_mode": "topic"}, "threshold": {"tfidf_mode": "token"}, "compare": {"sparsity_ratio": 0.4}}
#: Fields that every method obeys once it has scored.
OF_SELECTION = ("sparsity_type", "sparsity_ratio", "compare", "allocate")
#: Every factor at work.
ALL_ON = {name: VALUES[name][0] for name in ("weight_exp", "tf_exp", "idf_exp", "spikiness_exp")} | {"tfidf_k": 3}
LAYER = random_layer(5, neurons=8)


def scores(recipe: Recipe) -> bytes:
    context = LAYER.context(recipe)
    return b"".join(METHODS[recipe.method].score(module, context).tobytes() for module in MODULES)


def outcome(recipe: Recipe) -> list[bytes | str]:
    """Masks of every module, or what went wrong."""
    context = LAYER.context(recipe)
    try:
        return [prune_mask(module, context).tobytes() for module in (*MODULES, "q_proj")]
    except NeuronRankError as error:
        return [str(error)]


def both(method: str, name: str, **chosen: object) -> list[Recipe]:
    return [Recipe(**{**ALL_ON, **chosen, "method": method, name: value}) for value in VALUES[name]]


def test_every_field_is_under_test() -> None:
    assert {f.name for f in fields(Recipe)} == {"method", *VALUES}
    assert set(VALUES) >= {name for method in METHODS.values() for name in method.reads}


@pytest.mark.parametrize(("method", "name"), [(m.name, name) for m in METHODS.values() for name in sorted(m.reads)])
def test_a_field_that_is_read_matters(method: str, name: str) -> None:
    one, other = both(method, name, **SETTING.get(name, {}))
    assert scores(one) != scores(other)
    assert name not in without_effect(one, [name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_a_field_that_is_not_read_does_not_matter(method: str, mode: str) -> None:
    by_seed = {"seed"} if METHODS[method].mode_in(Recipe(tfidf_mode=mode)) == "topic" else set()
    for name in set(VALUES) - METHODS[method].reads - by_seed:
        one, other = both(method, name, **{"tfidf_mode": mode} if name != "tfidf_mode" else {})
        assert scores(one) == scores(other), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OF_SELECTION)
def test_every_method_obeys_the_selection(method: str, name: str) -> None:
    one, other = both(method, name, **SETTING.get(name, {}))
    assert outcome(one) != outcome(other)


def test_the_seed_matters_to_topics() -> None:
    one, other = both("neuronrank_tfidf", "seed", tfidf_mode="topic")
    assert scores(one) != scores(other)


@settings(max_examples=80)
@given(
    st.sampled_from(list(METHODS)),
    st.fixed_dictionaries(
        {},
        optional={
            **{name: st.sampled_from(VALUES[name]) for name in VALUES if name not in ("sparsity_ratio", "allocate")},
            "tfidf_mode": st.sampled_from(MODES),
            **{name: st.sampled_from([0.0, 1.0]) for name in ("input_exp", "tf_exp", "idf_exp", "spikiness_exp")},
        },
    ),
)
def test_without_effect_is_truthful(method: str, chosen: dict) -> None:
    recipe = Recipe(**{"tfidf_k": 3, **chosen, "method": method})
    expected = outcome(recipe)
    for name in without_effect(recipe, VALUES):
        for value in (*VALUES[name], *(MODES if name == "tfidf_mode" else ())):
            assert outcome(replace(recipe, **{name: value})) == expected, name


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ({"method": "magnitude"}, {"tf_exp", "weight_exp", "signal", "q_active", "variance_multi"}),
        ({"method": "wanda"}, {"tf_exp", "input_exp", "tfidf_mode", "token_weight"}),
        ({"method": "neuronrank_tfidf"}, {"tfidf_k", "threshold", "variance_exp"}),
        ({"method": "neuronrank_tfidf", "tfidf_mode": "topic"}, {"threshold"}),
        ({"method": "neuronrank_tfidf", "tfidf_mode": "token"}, {"tfidf_k", "q_active", "tokens_per_document"}),
        ({"method": "neuronrank_old"}, {"tfidf_mode", "tfidf_k", "q_active"}),
        ({"method": "neuronrank_wanda"}, {"tfidf_mode", "tfidf_k", "q_active", "signal", "tokens_per_document"}),
        ({"method": "wanda", "sparsity_type": "2:4"}, {"compare"}),
    ],
)
def test_dead_flags_are_named(chosen: dict, names: set[str]) -> None:
    assert names <= set(without_effect(Recipe(**chosen), VALUES))


def test_only_names_that_were_asked_about_come_back() -> None:
    assert without_effect(Recipe(method="magnitude"), ["seed", "tf_exp", "sparsity_ratio"]) == ["tf_exp"]
