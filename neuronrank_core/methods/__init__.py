"""All methods by name, found in this folder; and a recipe's settings resolved with its method's defaults.

A method is declared once, in a module of this package that assigns ``METHOD`` an instance of a subclass of
:class:`Method`: its formula, required statistics, comparison group and defaults.
"""

from collections.abc import Iterable
from dataclasses import asdict, replace

from neuronrank_core.errors import InvalidValueError
from neuronrank_core.methods.base import Method
from neuronrank_core.methods.experts import EXPERT_METHODS
from neuronrank_core.methods.scoring import NEURON_AXIS
from neuronrank_core.recipe import Exponents, Recipe
from neuronrank_core.registry import declared
from neuronrank_core.statistics.table import EXPERTS, SAMPLE, SIGNAL

#: Every method for weights by name.
METHODS: dict[str, Method] = {
    method.name: method
    for method in declared(__name__, __path__, "METHOD", besides=("base", "context", "scoring", "experts")).values()
}
#: The same, with those that score nothing but experts.
ALL_METHODS: dict[str, Method] = {**METHODS, **EXPERT_METHODS}


def method_of(recipe: Recipe) -> Method:
    """The recipe's method; raises InvalidValueError if its name is unknown."""
    if recipe.method not in ALL_METHODS:
        raise InvalidValueError("method", recipe.method, "one of " + ", ".join(ALL_METHODS))
    return ALL_METHODS[recipe.method]


def method_for(module: str, recipe: Recipe) -> Method:
    """The method that scores a module: the recipe's for the MLP, its ``beyond_mlp`` for attention and head."""
    method = method_of(recipe)
    return method if module in NEURON_AXIS else METHODS[method.beyond_mlp]


def mode(recipe: Recipe) -> str:
    """How groups are formed: the mode that the method fixes, or the recipe's ``tfidf_mode``."""
    return method_of(recipe).mode_in(recipe)


def exponents(recipe: Recipe) -> Exponents:
    """The recipe's exponents, completed with the method's defaults."""
    return method_of(recipe).exponents(recipe)


def decided(recipe: Recipe) -> Recipe:
    """The recipe with the defaults of its method filled in."""
    return replace(recipe, sparsity_ratio=recipe.ratio, **asdict(exponents(recipe)))


def requires(recipe: Recipe) -> frozenset[str]:
    """Kinds of statistics to collect; empty means that scoring needs no calibration text."""
    method = method_of(recipe)
    if recipe.removes_layers:
        return frozenset()
    if recipe.removes_heads:
        return method.head_requires(recipe)
    if recipe.removes_experts:
        return method.expert_requires(recipe)
    beyond = recipe.include_attention or recipe.prune_lm_head
    return method.requires(recipe) | (METHODS[method.beyond_mlp].requires(recipe) if beyond else frozenset())


def needs_text(recipe: Recipe) -> bool:
    """Whether a run reads calibration text."""
    measured = recipe.update != "none" or recipe.differs_by_layer or recipe.removes_layers
    return bool(requires(recipe)) or measured


def without_effect(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """Those of the named fields that do not affect the recipe's result."""
    needed = requires(recipe)
    dead = frozenset().union(*(method.reads for method in METHODS.values())) - method_of(recipe).reads
    if mode(recipe) != "topic":
        dead |= {"tfidf_k"}
    if mode(recipe) != "token":
        dead |= {"threshold"}
    if SAMPLE not in needed:
        dead |= {"tfidf_k", "q_active", "tokens_per_document"}
    if not needed & {SIGNAL, SAMPLE, EXPERTS}:
        dead |= {"tfidf_mode", "signal", "threshold"}
    if recipe.pattern:
        dead |= {"compare"}
    if recipe.removes_layers:  # No method scores them.
        dead |= method_of(recipe).reads
    if recipe.update == "none" or recipe.structured:  # Whole units are re-fitted in closed form.
        dead |= {"update_iterations", "update_target"}
    if not recipe.whole_neurons:
        dead |= {"multiple_of"}
    if not recipe.removes_heads:
        dead |= {"divisible_by"}
    if recipe.removes_heads:  # Their signal is what they add, and the score has no factor per weight.
        dead |= {"signal", "weight_exp", "input_exp"}
    if recipe.removes_experts:  # The same, and an expert is active where the router sends it its share of tokens.
        dead |= {"threshold", "q_active", "weight_exp", "input_exp"}
        if not (method_of(recipe).expert_signal and exponents(recipe).tf_exp):
            dead |= {"signal"} | ({"tfidf_mode"} if exponents(recipe).idf_exp == 0 else set())
        if method_of(recipe).expert_mode:
            dead |= {"tfidf_mode"}
    return sorted(dead & set(names))


def check_recipe(recipe: Recipe) -> None:
    """Check that the recipe's method supports its settings.

    Raises
    ------
    InvalidValueError
        If the method is unknown, cannot score what the recipe removes, or clusters sampled tokens into more topics than
        there are tokens; or if the recipe asks for the spikiness of experts.
    """
    check_method(recipe)
    tokens = recipe.nsamples * min(recipe.seqlen, recipe.tokens_per_document)
    if mode(recipe) == "topic" and SAMPLE in requires(recipe) and recipe.tfidf_k > tokens:
        raise InvalidValueError("tfidf_k", recipe.tfidf_k, f"[1, {tokens}], the number of sampled tokens")


def check_method(recipe: Recipe) -> None:
    """The part of :func:`check_recipe` that does not depend on the calibration text."""
    removed = {"neurons": recipe.whole_neurons, "heads": recipe.removes_heads, "experts": recipe.removes_experts}
    ranks = next((f"ranks_{what}" for what, removes in removed.items() if removes), "ranks_weights")
    if not getattr(method_of(recipe), ranks) and not recipe.removes_layers:
        able = ", ".join(name for name, method in ALL_METHODS.items() if getattr(method, ranks))
        raise InvalidValueError("method", recipe.method, f"with sparsity_type {recipe.sparsity_type}, one of {able}")
    if recipe.removes_experts and "spikiness_exp" in method_of(recipe).reads and exponents(recipe).spikiness_exp:
        raise InvalidValueError("spikiness_exp", exponents(recipe).spikiness_exp, "0 with sparsity_type experts")
