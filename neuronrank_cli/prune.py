"""``neuronrank prune``."""

from __future__ import annotations

from typing import Any

import click

from neuronrank_cli.command import OUTPUT, Command, Flag
from neuronrank_cli.console import Stages, print_json, print_report, warn
from neuronrank_cli.effects import without_effect
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
from neuronrank_core.methods import METHODS
from neuronrank_core.recipe import PRESETS, Recipe

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
    for note in without_effect(recipe, flags, set(given(ctx, flags))):
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
    from neuronrank_torch.job import Evaluation, Job, run_prune
    from neuronrank_torch.plan import plan_prune

    evaluation = Evaluation(flags["eval_dataset"], recipe.seqlen, flags["eval_windows"], recipe.bos)
    job = Job(
        **{name: flags[name] for name in _JOB},
        evaluation=evaluation if flags["evaluate"] else None,
    )
    return plan_prune(job, recipe) if flags["dry_run"] else run_prune(job, recipe, stages)
