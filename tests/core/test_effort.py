"""Effort levels: the settings that they stand for, and what the best is chosen from."""

from __future__ import annotations

import pytest

from neuronrank_core import Recipe
from neuronrank_core.effort import EFFORTS, candidates, effort_settings, passes_by_effort, windows_held_out
from neuronrank_core.methods import check_recipe

TYPES = ["unstructured", "2:4", "neurons"]


@pytest.mark.parametrize("sparsity_type", TYPES)
@pytest.mark.parametrize("effort", EFFORTS)
def test_every_effort_is_a_recipe_that_can_run(effort: str, sparsity_type: str) -> None:
    recipe = Recipe(sparsity_type=sparsity_type, **effort_settings(effort, sparsity_type))
    assert (recipe.update == "none") == (effort == "fast")
    for candidate in candidates(recipe).values():
        check_recipe(candidate)


@pytest.mark.parametrize("sparsity_type", TYPES)
def test_good_comes_first_and_nothing_else_equals_it(sparsity_type: str) -> None:
    good = Recipe(sparsity_type=sparsity_type, **effort_settings("good", sparsity_type))
    first, *others = candidates(good).items()
    assert first == ("good", good)
    assert len({*map(repr, dict(others).values()), repr(good)}) == len(others) + 1


def test_no_candidate_changes_what_the_user_set() -> None:
    good = Recipe(**effort_settings("good", "unstructured"))
    assert len(candidates(good)) > 1
    assert all(recipe.allocate == "uniform" for recipe in candidates(good, {"allocate", "seed"}).values())


def test_the_best_costs_at_most_four_times_the_good() -> None:
    """In passes of sequences through the model, which an allocation needs one more of, and the head another."""

    def cost(recipes: list[Recipe]) -> int:
        passes = sum(recipe.nsamples * (3 + recipe.differs_by_layer) for recipe in recipes)
        return passes + 2 * sum(map(windows_held_out, recipes[:-1]))

    times = {effort: cost(recipes) for effort, recipes in passes_by_effort(Recipe(nsamples=32)).items()}
    assert times["best"] <= 4 * times["good"]


def test_the_time_of_an_effort_heeds_what_the_user_set() -> None:
    times = passes_by_effort(Recipe(update="least-squares", nsamples=8), {"update", "nsamples"})
    assert {recipe.update for recipes in times.values() for recipe in recipes} == {"least-squares"}
    assert [recipe.nsamples for recipe in times["good"]] == [8]
    times = passes_by_effort(Recipe(), {"allocate"})  # Nothing is left to compare.
    assert times["best"] == times["good"]
