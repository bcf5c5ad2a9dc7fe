"""Which flags of ``neuronrank prune`` cannot change what a run does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from neuronrank_cli.options import SPELLING
from neuronrank_core.methods import METHODS
from neuronrank_core.methods.base import SAMPLE
from neuronrank_core.recipe import PRESETS, Recipe


def without_effect(recipe: Recipe, flags: dict[str, Any], chosen: set[str]) -> Iterator[str]:
    """Say which flags that the user set cannot change what this run does, and why."""
    for name in recipe.without_effect(chosen):
        yield f"{SPELLING[name]} has no effect on {_blind(recipe, name)}"
    preset = PRESETS.get(flags["preset"], {})
    if preset and len(recipe.without_effect(preset)) == len(preset):
        yield f"--preset has no effect on {recipe.method}"
    idle = _without_text(recipe, flags)
    if not flags["evaluate"]:
        idle |= dict.fromkeys(("eval_dataset", "eval_windows"), "without --eval")
    if not flags["save"]:
        idle |= dict.fromkeys(("force", "hidden_states"), "without --save")
    for name in sorted(chosen & idle.keys()):
        yield f"--{name.replace('_', '-')} has no effect {idle[name]}"


def _without_text(recipe: Recipe, flags: dict[str, Any]) -> dict[str, str]:
    """Flags that only matter to a run that looks at calibration text, where this one does not, with the reason."""
    unread = {"dataset", "nsamples", "propagate", "hidden_states"}
    if not flags["evaluate"]:
        unread |= {"seqlen", "bos", "batch_size"}
    if recipe.mode != "topic" or SAMPLE not in recipe.requires:  # Topics are found by random numbers.
        unread |= {"seed"}
    if not recipe.needs_text:
        return dict.fromkeys(unread | {"stats"}, f"on {recipe.method}, which needs no text")
    return dict.fromkeys(unread, "with --stats") if flags["stats"] else {}


def _blind(recipe: Recipe, name: str) -> str:
    """What of a recipe does not see a field: its sparsity type, its method, or the method with its other settings."""
    if name == "compare":
        return recipe.sparsity_type
    if name not in METHODS[recipe.method].reads:
        return recipe.method
    off = ", nor with --idf-exp 0" if recipe.exponents.idf_exp == 0 else ""
    return f"{recipe.method} in {recipe.mode} mode{off}"
