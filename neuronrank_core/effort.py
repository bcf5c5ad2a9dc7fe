"""Effort levels: quality against time, for users who do not want to choose an update and ratios themselves."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from neuronrank_core.recipe import EXPERTS, HEADS, LAYERS, Recipe

#: ``fast``: no update. ``good``: the remaining weights are updated. ``best``: several recipes are compared on held-out
#: calibration text, and one is run (:func:`neuronrank_core.measures.first_within_error`).
EFFORTS = ("fast", "good", "best")

#: Part of the calibration text that ``best`` holds out, at its end, and the part before it that is not used, so that
#: no article is in both parts.
HELD_OUT, GAP = 0.2, 0.05

#: What ``best`` compares with ``good``, by name, in the order of how far they are from it (docs/measured/log.md).
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "allocate modules": {"allocate": "modules"},
    "allocate both": {"allocate": "both"},
}


def effort_settings(effort: str, sparsity_type: str) -> dict[str, Any]:
    """Settings of the recipe that an effort level stands for; ``best`` starts from those of ``good``.

    Parameters
    ----------
    effort : str
        One of :data:`EFFORTS`.
    sparsity_type : str
        As in :class:`Recipe`. Whole neurons, heads and layers have no gradual update, experts none at all.
    """
    if effort == "fast" or sparsity_type == EXPERTS:
        return {"update": "none"}
    return {"update": "least-squares" if sparsity_type in ("neurons", *HEADS, *LAYERS) else "gradual"}


def candidates(recipe: Recipe, fixed: Collection[str] = ()) -> dict[str, Recipe]:
    """The recipes that ``best`` compares, by name; the first is ``recipe`` itself, named ``good``.

    Parameters
    ----------
    recipe : Recipe
    fixed : collection of str
        Names of settings that the user gave, which no candidate changes.
    """
    allowed = {
        name: settings
        for name, settings in VARIANTS.items()
        if not set(settings) & set(fixed) and (recipe.sparsity_type == "unstructured" or "allocate" not in settings)
    }
    return {"good": recipe, **{name: replace(recipe, **settings) for name, settings in allowed.items()}}


def passes_by_effort(recipe: Recipe, fixed: Collection[str] = ()) -> dict[str, list[Recipe]]:
    """The recipes that each effort level runs one after another, for an estimate of its time.

    Parameters
    ----------
    recipe, fixed
        As in :func:`candidates`.
    """

    def at(effort: str) -> Recipe:
        settings = effort_settings(effort, recipe.sparsity_type).items()
        return replace(recipe, **{name: value for name, value in settings if name not in fixed})

    compared = candidates(at("best"), fixed)
    return {
        "fast": [at("fast")],
        "good": [at("good")],
        "best": [*map(rehearsed, compared.values() if len(compared) > 1 else ()), list(compared.values())[-1]],
    }


def rehearsed(recipe: Recipe) -> Recipe:
    """The recipe as ``best`` runs each candidate: on half of the sequences, with half of the update's iterations."""
    half = {name: math.ceil(getattr(recipe, name) / 2) for name in ("nsamples", "update_iterations")}
    return replace(recipe, **half)


def windows_held_out(candidate: Recipe) -> int:
    """Number of windows on which a candidate is measured, if the held-out text is so long: half of its sequences."""
    return max(1, candidate.nsamples // 2)
