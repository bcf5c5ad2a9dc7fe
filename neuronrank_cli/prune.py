"""``neuronrank prune``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click

from neuronrank_cli.console import Stages, print_json, print_report, warn
from neuronrank_cli.options import batch_size_option, flag_of, given, json_option, model_options, recipe_options
from neuronrank_core.recipe import PRESETS, Recipe


@click.command()
@model_options
@click.option("--save", type=click.Path(), help="Output folder: an ordinary Hugging Face model.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--dataset", default="builtin", help="Calibration text: builtin, a .txt or .jsonl file, or a hub name.")
@click.option("--preset", type=click.Choice(tuple(PRESETS)), help="Exponents to start from; flags given beat them.")
@recipe_options
@batch_size_option
@click.option("--eval", "evaluate", is_flag=True, help="Measure perplexity before and after.")
@click.option("--eval-dataset", default="builtin", help="Text to measure on.")
@click.option("--eval-windows", type=click.IntRange(min=1), help="How many windows.  [default: all]")
@click.option("--dry-run", is_flag=True, help="Show what would be pruned, without doing it.")
@json_option
@click.pass_context
def prune(ctx: click.Context, /, **flags: Any) -> None:
    r"""Prune a model and save it as an ordinary Hugging Face folder.

    \b
    Example:
      neuronrank prune --model builtin:smollm2-135m --nsamples 32 --eval --eval-windows 24 --save out/
    """
    names = {f.name for f in fields(Recipe)}
    chosen = given(ctx, {name: value for name, value in flags.items() if name in names})
    recipe = Recipe.from_preset(flags["preset"], **chosen)
    for name in recipe.without_effect(chosen):
        warn(f"{flag_of(name)} has no effect on {recipe.method} with these settings")
    if not (flags["save"] or flags["evaluate"] or flags["dry_run"]):
        raise click.UsageError("nothing to do with the result: give --save, --eval or --dry-run", ctx)

    from neuronrank_torch.job import Evaluation, Job, run_prune
    from neuronrank_torch.plan import plan_prune

    evaluation = Evaluation(flags["eval_dataset"], recipe.seqlen, flags["eval_windows"], recipe.bos)
    job = Job(
        **{name: flags[name] for name in ("model", "dataset", "save", "force", "device", "dtype", "batch_size")},
        evaluation=evaluation if flags["evaluate"] else None,
    )
    with Stages() as stages:
        report = plan_prune(job, recipe) if flags["dry_run"] else run_prune(job, recipe, stages)
    for note in report["notes"]:
        warn(note)
    if flags["as_json"]:
        print_json(report)
    else:
        print_report(report)
