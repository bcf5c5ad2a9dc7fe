"""``neuronrank eval``."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.table import Table

from neuronrank_cli.command import Command, Flag
from neuronrank_cli.console import Stages, print_json, protocol, warn
from neuronrank_cli.options import (
    BOS,
    BOS_HELP,
    Name,
    count_flag,
    given,
    json_flag,
    model_flags,
    text_flag,
    windows_flag,
)
from neuronrank_core import InputError
from neuronrank_core.recipe import Recipe

WHAT, TASKS = "What to measure on", "Standard tasks"
#: Flags that say how to measure perplexity, and those that say how tasks are run.
_PERPLEXITY, _TASKS = ("dataset", "windows", "seqlen", "bos"), ("include_path", "fewshot", "limit")


@click.command("eval", cls=Command)
@model_flags
@text_flag("--dataset", WHAT, "Text")
@windows_flag("--windows", WHAT)
@count_flag("--seqlen", WHAT, "Tokens in a window.", low=2, default=Recipe.seqlen)
@click.option("--bos", cls=Flag, section=WHAT, type=Name(BOS), default=Recipe.bos, help=BOS_HELP)
@count_flag("--batch-size", WHAT, "Windows, or questions, in a forward pass.", default=1)
@click.option(
    "--tasks",
    cls=Flag,
    section=TASKS,
    metavar="NAMES",
    help="Tasks of lm-eval, separated by commas, instead of perplexity: hellaswag,arc_easy. Needs neuronrank[eval].",
)
@click.option(
    "--include-path", cls=Flag, section=TASKS, metavar="FOLDER", help="Further tasks, as lm-eval's YAML files."
)
@count_flag("--fewshot", TASKS, "Solved examples before each question.", low=0, default_text="the task's own")
@count_flag("--limit", TASKS, "Questions of each task.", default_text="all")
@json_flag
@click.pass_context
def evaluate(ctx: click.Context, /, model: str, tasks: str | None, as_json: bool, **how: Any) -> None:
    """Measure perplexity, and say on what; or run standard tasks.

    The text is tokenised as one string and cut in consecutive windows of --seqlen tokens; the remainder is dropped.
    """
    idle, why = (_TASKS, "without --tasks") if tasks is None else (_PERPLEXITY, "with --tasks")
    for name in given(ctx, dict.fromkeys(idle)):
        warn(f"--{name.replace('_', '-')} has no effect {why}")
    how = {name: value for name, value in how.items() if name not in idle}
    if tasks is None:
        _run_perplexity(model, how, as_json)
    else:
        _run_tasks(model, tasks, how, as_json)


def _run_perplexity(model: str, how: dict[str, Any], as_json: bool) -> None:
    placed = {name: how.pop(name) for name in ("device", "dtype", "batch_size")}
    with Stages() as stages:
        from neuronrank_torch.runs.evaluate import run_eval
        from neuronrank_torch.runs.job import Evaluation

        measured = run_eval(model, Evaluation(**how), **placed, progress=stages).to_dict()
    if as_json:
        print_json({"model": model, "dataset": how["dataset"], **measured})
    else:
        click.echo(f"perplexity: {measured['perplexity']:.4f}")
        click.echo(f"measured on: {protocol(how['dataset'], measured)}")


def _run_tasks(model: str, tasks: str, how: dict[str, Any], as_json: bool) -> None:
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names no task", hint="for example --tasks hellaswag,arc_easy")
    with Stages() as stages:
        from neuronrank_torch.runs.tasks import run_tasks

        result = run_tasks(model, names, **how, progress=stages)
    if as_json:
        print_json(result)
    else:
        print_tasks(result)


def print_tasks(result: dict[str, Any]) -> None:
    """Print a line for each metric of each task, with its standard error."""
    table = Table()
    for heading in ("task", "examples", "metric", "value", "standard error"):
        table.add_column(heading, justify="right" if heading not in ("task", "metric") else "left")
    for name, metrics in result["tasks"].items():
        for key, value in metrics.items():
            metric, _, variant = key.partition(",")
            if variant and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{variant}")
                shown = metric if variant == "none" else f"{metric} ({variant})"
                table.add_row(name, str(result["fewshot"].get(name, "")), shown, _figure(value), _figure(error))
    Console().print(table)
    asked = "all questions" if result["limit"] is None else f"the first {result['limit']} questions of each"
    click.echo(f"measured on: {asked}, by lm-eval {result['lm_eval']}")


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)
