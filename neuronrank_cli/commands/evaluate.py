"""``neuronrank eval``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from neuronrank_cli import options
from neuronrank_cli.command import Command
from neuronrank_cli.console import Stages, decimal, kl_texts, perplexity_text, print_table, protocol, say, show
from neuronrank_core import InputError
from neuronrank_core.recipe import Recipe

if TYPE_CHECKING:
    from neuronrank_torch.runs.evaluate import EvalResult
    from neuronrank_torch.runs.tasks import TasksResult

TEXT, TASKS = "Text", "Standard tasks"
#: Flags for measuring perplexity, and flags for running tasks.
_PERPLEXITY, _TASKS = ("reference", "dataset", "windows", "seqlen", "bos"), ("include_path", "fewshot", "limit")


@click.command("eval", cls=Command)
@options.model_flags
@options.flag(
    "--reference",
    TEXT,
    "Model before pruning, to compare the predictions with: KL divergence, and how often the most likely token is the "
    "same.",
    metavar="MODEL",
)
@options.text_flag("--dataset", TEXT, "Evaluation text")
@options.windows_flag("--windows", TEXT)
@options.count_flag("--seqlen", TEXT, "Tokens per window.", low=2, default=Recipe.seqlen)
@options.recipe_flags("Calibration", ("bos",), TEXT)
@options.count_flag("--batch-size", TEXT, "Windows, or questions, per forward pass.", default=1)
@options.flag(
    "--tasks",
    TASKS,
    "Tasks of lm-eval to run instead, separated by commas: hellaswag,arc_easy. Requires neuronrank[eval].",
    metavar="NAMES",
)
@options.flag("--include-path", TASKS, "Folder with more tasks, as YAML files for lm-eval.", metavar="FOLDER")
@options.count_flag("--fewshot", TASKS, "Solved examples in each prompt.", low=0, default_text="set by the task")
@options.count_flag("--limit", TASKS, "Number of questions of each task.", default_text="all")
@options.json_flag
@click.pass_context
def evaluate(ctx: click.Context, /, model: str, tasks: str | None, as_json: bool, **how: Any) -> None:
    """Measure perplexity on a text, or run standard tasks.

    The text is tokenized as one string and split into consecutive windows of --seqlen tokens; the remainder is ignored.
    The standard error of the perplexity is that over windows.
    """
    idle, why = (_TASKS, "without --tasks") if tasks is None else (_PERPLEXITY, "with --tasks")
    options.warn_of_idle(ctx, dict.fromkeys(idle, why))
    how = {name: value for name, value in how.items() if name not in idle}
    if tasks is None:
        _run_perplexity(model, how, as_json)
    else:
        _run_tasks(model, tasks, how, as_json)


def _run_perplexity(model: str, how: dict[str, Any], as_json: bool) -> None:
    placed = {name: how.pop(name) for name in ("reference", "device", "dtype", "batch_size")}
    with Stages() as stages:
        from neuronrank_torch.runs.evaluate import run_eval
        from neuronrank_torch.runs.job import Evaluation

        result = run_eval(model, Evaluation(**how), **placed, progress=stages)
    show(result, as_json, print_perplexity)


def print_perplexity(result: EvalResult) -> None:
    """Print a perplexity, how it compares with the reference, and the protocol."""
    say(f"perplexity: {perplexity_text(result)}")
    if result.reference:
        say(f"perplexity of the reference: {perplexity_text(result.reference.perplexity)}")
        mean, tail = kl_texts(result.reference)
        say(f"KL divergence from the reference, nats per token: mean {mean}, 99th percentile {tail}")
        say(f"same most likely token: {result.reference.agreement:.2%}")
    say(f"measured on: {protocol(result.dataset, result)}")


def _run_tasks(model: str, tasks: str, how: dict[str, Any], as_json: bool) -> None:
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks does not name a task", hint="for example --tasks hellaswag,arc_easy")
    with Stages() as stages:
        from neuronrank_torch.runs.tasks import run_tasks

        result = run_tasks(model, names, **how, progress=stages)
    show(result, as_json, print_tasks)


def print_tasks(result: TasksResult) -> None:
    """Print a line for each metric of each task, with its standard error."""
    rows = []
    for name, metrics in result.tasks.items():
        for key, value in metrics.items():
            metric, _, variant = key.partition(",")
            if variant and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{variant}")
                shown = metric if variant == "none" else f"{metric} ({variant})"
                rows.append((name, str(result.fewshot.get(name, "")), shown, _figure(value), _figure(error)))
    print_table(("task", "examples", "metric", "value", "standard error"), rows, left=("task", "metric"))
    asked = "all questions" if result.limit is None else f"the first {result.limit} questions of each task"
    say(f"measured on: {asked}, with lm-eval {result.lm_eval}")


def _figure(value: Any) -> str:
    return decimal(value) if isinstance(value, float) else "" if value is None else str(value)
