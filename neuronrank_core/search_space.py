"""The search space of a tuning run, and its initial recipes."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

from neuronrank_core.methods import check_recipe, decided, exponents, without_effect
from neuronrank_core.recipe import MODES, PRESETS, Exponents, Recipe

#: Lowest value, highest value and step. Steps keep recipes readable and include 0, which omits a factor.
RANGES = {
    "weight_exp": (0.5, 1.5, 0.125),
    "input_exp": (0.0, 1.5, 0.25),
    "tf_exp": (0.0, 2.0, 0.125),
    "idf_exp": (0.0, 3.0, 0.25),
    "spikiness_exp": (0.0, 1.0, 0.25),
    "q_active": (0.3, 0.9, 0.05),
}
#: In the order of choice: earlier choices decide whether later ones have an effect.
NAMES = ("weight_exp", "input_exp", "tf_exp", "idf_exp", "spikiness_exp", "tfidf_mode", "q_active", "tfidf_k")
#: Number of topics: maximum and step.
_TOPICS, _TOPICS_STEP = 256, 16
DEFAULT_METHODS = ("neuronrank_wanda", "neuronrank_tfidf", "wanda")
#: The same for whole experts.
DEFAULT_EXPERT_METHODS = ("neuronrank_wanda", "neuronrank_tfidf", "reap", "expert_frequency")


class Trial(Protocol):
    """The part of an Optuna trial that :class:`Space` uses."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float) -> float:
        """A number from a grid."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int) -> int:
        """An integer from a grid."""


@dataclass(frozen=True)
class Space:
    """The recipes that a search may try.

    Parameters
    ----------
    base : Recipe
        Settings that are not searched: sparsity, scope, signal, documents.
    methods : tuple of str
        Methods to choose from.
    allocations : tuple of str
        Allocations to choose from.
    """

    base: Recipe
    methods: tuple[str, ...] = DEFAULT_METHODS
    allocations: tuple[str, ...] = ("uniform",)

    def recipe(self, trial: Trial) -> Recipe:
        """The recipe of a trial; the trial chooses only settings that the recipe reads."""
        method = trial.suggest_categorical("method", self.methods)
        # At most as many topics as tokens, in case topic mode is chosen next.
        recipe = replace(self.base, method=method, tfidf_k=min(self._topics, Recipe.tfidf_k))
        if len(self.allocations) > 1:
            recipe = replace(recipe, allocate=trial.suggest_categorical("allocate", self.allocations))
        for name in self._names:
            if not without_effect(recipe, {name}):
                recipe = replace(recipe, **{name: self._suggest(trial, name)})
        return canonical(recipe)

    def _suggest(self, trial: Trial, name: str) -> Any:
        if name == "tfidf_mode":
            return trial.suggest_categorical(name, MODES)
        if name == "tfidf_k":
            return trial.suggest_int(name, min(_TOPICS_STEP, self._topics), self._topics, step=_TOPICS_STEP)
        low, high, step = RANGES[name]
        return round(trial.suggest_float(name, low, high, step=step), 6)

    @property
    def _topics(self) -> int:
        tokens = self.base.nsamples * min(self.base.seqlen, self.base.tokens_per_document)
        return min(_TOPICS, tokens - tokens % _TOPICS_STEP or tokens)

    @property
    def _names(self) -> tuple[str, ...]:
        """Settings to search; the spikiness of experts is not defined."""
        return tuple(name for name in NAMES if name != "spikiness_exp" or not self.base.removes_experts)

    @property
    def established(self) -> str:
        """The method that every search is compared with."""
        return "reap" if self.base.removes_experts else "wanda"

    def starts(self) -> dict[str, Recipe]:
        """Distinct recipes that every search tries first, by name: established, defaults, presets, allocation."""
        named: dict[str, Recipe] = {}
        for name, recipe in self._starts():
            if recipe not in named.values():
                named[name] = recipe
        return named

    def _starts(self) -> Iterator[tuple[str, Recipe]]:
        for method in dict.fromkeys((self.established, *self.methods)):
            yield method, canonical(replace(self.base, method=method))
        main = Recipe.method
        for allocate in self.allocations if main in self.methods else ():
            yield f"{main}, allocate {allocate}", canonical(replace(self.base, method=main, allocate=allocate))
        for method in self.methods:
            for preset, values in PRESETS.items():
                # `canonical` resets exponents that the method does not read.
                chosen: dict[str, Any] = {name: value for name, value in values.items() if name in self._names}
                chosen["method"] = method
                yield f"{method}, {preset}", canonical(replace(self.base, **chosen))

    def parameters(self, recipe: Recipe) -> dict[str, Any]:
        """Trial parameters that yield a recipe; empty if it lies outside the space."""
        known = _Known(recipe)
        if recipe.method not in self.methods or self.recipe(known) != recipe:
            return {}
        return known.chosen


class _Known:
    """A trial that chooses the values of a given recipe and records them."""

    def __init__(self, recipe: Recipe) -> None:
        self.values = asdict(decided(recipe))
        self.chosen: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        del choices
        self.chosen[name] = self.values[name]
        return self.chosen[name]

    def suggest_float(self, name: str, low: float, high: float, *, step: float) -> float:
        return float(self.suggest_categorical(name, (low, high, step)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int) -> int:
        return int(self.suggest_categorical(name, (low, high, step)))


def canonical(recipe: Recipe) -> Recipe:
    """Reset settings without effect to their defaults, so that equivalent recipes are equal."""
    defaults: dict[str, Any] = {f.name: f.default for f in fields(Recipe)}
    unset: dict[str, Any] = dict.fromkeys(asdict(Exponents()))
    own = asdict(exponents(replace(recipe, **unset)))
    dead = {*without_effect(recipe, defaults), *(name for name in own if getattr(recipe, name) == own[name])}
    complete = replace(recipe, **{name: defaults[name] for name in dead})
    check_recipe(complete)
    return complete
