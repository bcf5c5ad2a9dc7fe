"""``neuronrank prune``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from neuronrank_cli.command import OUTPUT, Command, Flag
from neuronrank_cli.console import Stages, print_json, print_report, warn
from neuronrank_cli.options import (
    SPELLING,
    count_flag,
    force_flag,
    given,
    hidden_states_flag,
    json_flag,
    model_flags,
    recipe_flags,
    recipe_of,
    text_flag,
    windows_flag,
)
from neuronrank_core.methods import METHODS, exponents, mode, needs_text, requires, without_effect
from neuronrank_core.recipe import PRESETS, Recipe
from neuronrank_core.statistics.table import SAMPLE

EXPONENTS, CALIBRATION, PERPLEXITY = "Exponents of the score", "Calibration", "Perplexity"
#: Flags that are fields of the job by the same name.
_JOB = ("model", "dataset", "stats", "save", "force", "hidden_states", "device", "dtype", "batch_size")
EXAMPLE = """\b
Example:
  neuronrank prune --model builtin:smollm2-135m --nsamples 32 --eval --eval-windows 24 --save out/
"""
TABLES = {
    "Methods (a, b, c, r: the exponents of weight, TF, IDF, spikiness)": [
        (method.name, method.summary) for method in METHODS.values()
    ],
    "Presets": [
        (name, " ".join(f"{SPELLING[field]} {value:g}" for field, value in values.items()))
        for name, values in PRESETS.items()
    ],
}


@click.command(cls=Command, tables=TABLES, epilog=EXAMPLE)
@model_flags
@recipe_flags("What to prune")
@click.option(
    "--preset",
    cls=Flag,
    section=EXPONENTS,
    metavar="PRESET",
    type=click.Choice(tuple(PRESETS)),
    help="Where to start from, see below; flags given beat it.",
)
@recipe_flags(EXPONENTS)
@recipe_flags("TF and IDF")
@recipe_flags("Factor of neuronrank_unstructured")
@text_flag("--dataset", CALIBRATION, "Text")
@click.option(
    "--stats",
    cls=Flag,
    section=CALIBRATION,
    metavar="FOLDER",
    help="Statistics that `neuronrank collect` saved, to prune by instead of a text.",
)
@recipe_flags(CALIBRATION)
@count_flag("--batch-size", CALIBRATION, "Sequences in a micro-batch.", default_text="2048 tokens' worth")
@click.option(
    "--eval", "evaluate", cls=Flag, section=PERPLEXITY, is_flag=True, help="Measure it before and after pruning."
)
@text_flag("--eval-dataset", PERPLEXITY, "Text")
@windows_flag("--eval-windows", PERPLEXITY)
@click.option(
    "--save",
    cls=Flag,
    section=OUTPUT,
    metavar="FOLDER",
    help="Where to save: an ordinary Hugging Face model, with a report in neuronrank.json.",
)
@force_flag("a model that is saved there")
@hidden_states_flag
@click.option(
    "--dry-run", cls=Flag, section=OUTPUT, is_flag=True, help="Check everything and show what would be pruned."
)
@json_flag
@click.pass_context
def prune(ctx: click.Context, /, **flags: Any) -> None:
    """Prune a model and save it as an ordinary Hugging Face folder.

    Saved layer by layer: the same command goes on where it was interrupted or killed, and one layer at a time is in
    memory.
    """
    recipe = recipe_of(ctx, flags)
    for note in flags_without_effect(recipe, flags, set(given(ctx, flags))):
        warn(note)
    if not (flags["save"] or flags["evaluate"] or flags["dry_run"]):
        raise click.UsageError("nothing to do with the result: give --save, --eval or --dry-run", ctx)

    with Stages() as stages:
        report = _run(recipe, flags, stages)
    for note in report["notes"]:
        warn(note)
    if flags["as_json"]:
        print_json(report)
    else:
        print_report(report)


def _run(recipe: Recipe, flags: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """Do it, or plan it; torch is imported here, where a run needs it, and not for --help."""
    from neuronrank_torch.runs.dry_run import plan_prune
    from neuronrank_torch.runs.job import Evaluation, Job
    from neuronrank_torch.runs.prune import run_prune

    evaluation = Evaluation(flags["eval_dataset"], recipe.seqlen, flags["eval_windows"], recipe.bos)
    job = Job(
        **{name: flags[name] for name in _JOB},
        evaluation=evaluation if flags["evaluate"] else None,
    )
    return plan_prune(job, recipe) if flags["dry_run"] else run_prune(job, recipe, stages)


def flags_without_effect(recipe: Recipe, flags: dict[str, Any], chosen: set[str]) -> Iterator[str]:
    """Say which flags that the user set cannot change what this run does, and why."""
    for name in without_effect(recipe, chosen):
        yield f"{SPELLING[name]} has no effect on {_blind(recipe, name)}"
    preset = PRESETS.get(flags["preset"], {})
    if preset and len(without_effect(recipe, preset)) == len(preset):
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
    if mode(recipe) != "topic" or SAMPLE not in requires(recipe):  # Topics are found by random numbers.
        unread |= {"seed"}
    if not needs_text(recipe):
        return dict.fromkeys(unread | {"stats"}, f"on {recipe.method}, which needs no text")
    return dict.fromkeys(unread, "with --stats") if flags["stats"] else {}


def _blind(recipe: Recipe, name: str) -> str:
    """What of a recipe does not see a field: its sparsity type, its method, or the method with its other settings."""
    if name == "compare":
        return recipe.sparsity_type
    if name not in METHODS[recipe.method].reads:
        return recipe.method
    off = ", nor with --idf-exp 0" if exponents(recipe).idf_exp == 0 else ""
    return f"{recipe.method} in {mode(recipe)} mode{off}"
