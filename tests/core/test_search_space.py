"""The space that ``neuronrank tune`` searches: valid recipes alone, and where a search starts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import Any

import pytest

from neuronrank_core import METHODS, PRESETS, InvalidValueError, Recipe
from neuronrank_core.methods import ALL_METHODS, exponents, without_effect
from neuronrank_core.search_space import Space, canonical

BASE = Recipe(nsamples=4, seqlen=32, propagate="dense")
BOTH = ("uniform", "neuronrank")


class Dice:
    """A trial that chooses at random, and remembers what it was asked."""

    def __init__(self, seed: int) -> None:
        self.random, self.asked = random.Random(seed), {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        assert name not in self.asked
        self.asked[name] = self.random.choice(choices)
        return self.asked[name]

    def suggest_float(self, name: str, low: float, high: float, *, step: float) -> float:
        steps = round((high - low) / step)
        assert low + steps * step == pytest.approx(high)
        return float(self.suggest_categorical(name, [low + i * step for i in range(steps + 1)]))

    def suggest_int(self, name: str, low: int, high: int, *, step: int) -> int:
        assert (high - low) % step == 0
        return int(self.suggest_categorical(name, range(low, high + 1, step)))


@pytest.mark.parametrize("methods", [tuple(METHODS), ("neuronrank_wanda",), ("wanda", "neuronrank_tfidf")])
@pytest.mark.parametrize("base", [BASE, replace(BASE, sparsity_type="2:4"), replace(BASE, nsamples=1, seqlen=9)])
def test_every_draw_is_a_valid_recipe_asked_for_no_more_than_it_reads(methods: tuple[str, ...], base: Recipe) -> None:
    space = Space(base, methods, ("uniform",) if base.pattern else BOTH)
    for seed in range(70):
        dice = Dice(seed)
        recipe = space.recipe(dice)  # A recipe checks itself.
        assert without_effect(recipe, dice.asked) == []
        for name, value in dice.asked.items():
            chosen = getattr(exponents(recipe), name) if name.endswith("_exp") else getattr(recipe, name)
            assert chosen == pytest.approx(value)
        assert space.parameters(recipe) == pytest.approx(dice.asked)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["unstructured", "neurons", "experts"])
def test_the_shortest_form_of_a_recipe_has_the_same_exponents(kind: Any, exponent: float) -> None:
    for method in ALL_METHODS:
        recipe = Recipe(method, sparsity_type=kind, idf_exp=exponent)
        with suppress(InvalidValueError):  # Of a method that cannot rank these.
            short, read = canonical(recipe), ALL_METHODS[method].reads
            before, after = (asdict(exponents(each)) for each in (recipe, short))
            assert {name: after[name] for name in after if name in read} == {n: before[n] for n in before if n in read}


@pytest.mark.parametrize("signal", ["gate", "product"])
def test_the_starting_points(signal: Any) -> None:
    base = replace(BASE, signal=signal)
    starts = Space(base, allocations=BOTH).starts()
    assert len(set(starts.values())) == len(starts)
    wanted = [
        replace(base, method="wanda"),
        *(replace(base, method=method) for method in ("neuronrank_wanda", "neuronrank_tfidf")),
        replace(base, allocate="neuronrank"),
        *(replace(base, method="neuronrank_tfidf", **exponents) for exponents in PRESETS.values()),
        *(replace(base, **exponents) for exponents in PRESETS.values()),
    ]
    assert {canonical(recipe) for recipe in wanted} == set(starts.values())
    space = Space(base, allocations=BOTH)
    assert all(space.parameters(recipe) for recipe in starts.values())
    only = Space(base, ("neuronrank_tfidf",))
    assert only.starts()["wanda"] == starts["wanda"]
    assert only.parameters(starts["wanda"]) == {}


def test_recipes_that_do_the_same_are_equal() -> None:
    one = canonical(Recipe(method="wanda", idf_exp=2.0, tfidf_mode="topic", tfidf_k=3, signal="product"))
    assert one == Recipe(method="wanda")
    assert canonical(Recipe(tf_exp=0.5, q_active=0.7)) == Recipe()
    kept = Recipe(method="neuronrank_tfidf", tfidf_mode="topic", tfidf_k=3, q_active=0.7, signal="product", seed=3)
    assert canonical(kept) == kept
    assert {f.name for f in fields(Recipe)} == set(vars(canonical(kept)))
