"""``neuronrank compare``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from neuronrank_cli import options
from neuronrank_cli.command import Command
from neuronrank_cli.console import Stages, decimal, kl_texts, print_table, protocol, say, show, size_text
from neuronrank_core.recipe import Recipe

if TYPE_CHECKING:
    from neuronrank_core.overlap import Overlap
    from neuronrank_torch.evaluation.speed import Spread
    from neuronrank_torch.runs.compare import CompareResult, ModelFigures

MEASURE = "Perplexity and speed"
#: What is timed, by the names of the results.
TASKS = {"prefill": "reading (prefill)", "decode": "writing (decode)"}


@click.command(cls=Command)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@options.device_flags
@options.eval_flag(MEASURE, "Measure the perplexity of both, and how far the predictions of B are from those of A.")
@options.text_flag("--eval-dataset", MEASURE, "Evaluation text")
@options.windows_flag("--eval-windows", MEASURE)
@options.recipe_flags("Calibration", ("bos",), MEASURE)
@options.flag("--speed", MEASURE, "Measure how fast both read and write, in turn.", is_flag=True)
@options.count_flag(
    "--seqlen", MEASURE, "Tokens per window, and per sequence of --speed.", low=2, default=Recipe.seqlen
)
@options.count_flag("--batch-size", MEASURE, "Windows per forward pass.", default=1)
@options.json_flag
@click.pass_context
def compare(ctx: click.Context, /, first: str, second: str, as_json: bool, **flags: Any) -> None:
    """Compare two models: common zeros, size, perplexity and speed.

    A and B are named like --model of the other commands: for example two pruned models, or an original and its pruned
    model. If their shapes differ, their zeros are not compared.
    """
    idle = {} if flags["evaluate"] else dict.fromkeys(("eval_dataset", "eval_windows", "bos"), "without --eval")
    if not (flags["evaluate"] or flags["speed"]):
        idle |= dict.fromkeys(("seqlen", "batch_size"), "without --eval or --speed")
    options.warn_of_idle(ctx, dict(sorted(idle.items())))
    with Stages() as stages:
        from neuronrank_torch.runs.compare import CompareJob, run_compare
        from neuronrank_torch.runs.job import Evaluation

        evaluation = Evaluation(flags["eval_dataset"], flags["seqlen"], flags["eval_windows"], flags["bos"])
        job = CompareJob(
            (first, second),
            evaluation if flags["evaluate"] else None,
            flags["seqlen"] if flags["speed"] else None,
            **options.fields_of(CompareJob, flags),
        )
        result = run_compare(job, stages)
    show(result, as_json, partial(print_comparison, dataset=flags["eval_dataset"]))


def print_comparison(result: CompareResult, dataset: str) -> None:
    """Print the overlap by layer and module, then the figures of both models."""
    from neuronrank_torch.evaluation.speed import ROUNDS

    a, b = result.models
    say(f"A: {a.model}")
    say(f"B: {b.model}")
    if result.layers:
        say("by module: weights that are zero in both / in either; and the share of weights that both keep:")
        _print_overlap(result)
    _print_figures(a, b)
    for task, by in (result.speed_up or {}).items():
        claim = "B is" if by.clear else "no difference beyond the spread: B is"
        interval = f"median of {ROUNDS} rounds, 96 % interval {by.lower:.2f} to {by.upper:.2f}"
        click.echo(f"{TASKS[task]}: {claim} {by.median:.2f} times as fast as A ({interval})")
    if result.divergence:
        mean, tail = kl_texts(result.divergence)
        say(f"KL divergence of B from A, nats per token: mean {mean}, 99th percentile {tail}")
        say(f"same most likely token: {result.divergence.agreement:.2%}")
    ways = [protocol(dataset, measured) for measured in (a.perplexity, b.perplexity) if measured]
    if len(set(ways)) == 1:
        say(f"perplexity measured on: {ways[0]}")
    elif ways:
        say(f"perplexity of A measured on: {ways[0]}")
        say(f"perplexity of B measured on: {ways[1]}; not comparable with that of A")


def _print_overlap(result: CompareResult) -> None:
    def cells(name: str, modules: dict[str, Overlap]) -> list[str]:
        size = sum(m.size for m in modules.values())
        kept = sum(m.size * m.kept_in_both for m in modules.values()) / size
        jaccard = [f"{modules[name].jaccard:.3f}" if name in modules else "" for name in result.modules]
        return [name, *jaccard, f"{kept:.2%}"]

    headings = ("layer", *(name.removesuffix("_proj") for name in result.modules), "both keep")
    rows = [cells(str(layer.layer), layer.modules) for layer in result.layers]
    print_table(headings, rows, total=cells("all", result.modules))


def _print_figures(a: ModelFigures, b: ModelFigures) -> None:
    rows: dict[str, Callable[[ModelFigures], str]] = {
        "size on disk": lambda m: size_text(m.bytes),
        "parameters": lambda m: f"{m.parameters:,}",
        "not zero": lambda m: f"{m.nonzero:,}",
        "zero": lambda m: f"{1 - m.nonzero / m.parameters:.2%}",
    }
    if a.perplexity:
        rows["perplexity"] = lambda m: decimal(m.perplexity.perplexity) if m.perplexity else ""
        rows["its standard error"] = lambda m: (
            decimal(m.perplexity.standard_error) if m.perplexity and m.perplexity.standard_error is not None else ""
        )
    rows["weights in memory"] = lambda m: size_text(m.memory)
    for task, name in TASKS.items():
        if getattr(a.speed, task, None):
            rows[f"{name}, tokens/s"] = partial(_rate, task)
    print_table(("", "A", "B"), [(name, figure(a), figure(b)) for name, figure in rows.items()], left=("",))


def _rate(task: str, model: ModelFigures) -> str:
    found: Spread = getattr(model.speed, task)
    return f"{found.median:,.0f} ({found.lower:,.0f} to {found.upper:,.0f})"
