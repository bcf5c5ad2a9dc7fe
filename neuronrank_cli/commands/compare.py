"""``neuronrank compare``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from neuronrank_cli import options
from neuronrank_cli.command import Command
from neuronrank_cli.console import Stages, protocol, right_aligned, show, size_text, warn
from neuronrank_core.recipe import Recipe

if TYPE_CHECKING:
    from neuronrank_core.overlap import Overlap
    from neuronrank_torch.runs.compare import CompareResult, ModelFigures

MEASURE = "Perplexity and speed"


@click.command(cls=Command)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@options.device_flags
@options.flag("--eval", "evaluate", section=MEASURE, is_flag=True, help="Measure the perplexity of both.")
@options.text_flag("--eval-dataset", MEASURE, "Evaluation text")
@options.windows_flag("--eval-windows", MEASURE)
@options.flag("--bos", section=MEASURE, type=options.Name(options.BOS), default=Recipe.bos, help=options.BOS_HELP)
@options.flag("--speed", section=MEASURE, is_flag=True, help="Measure the speed of a forward pass.")
@options.count_flag(
    "--seqlen", MEASURE, "Tokens per window, and per sequence of --speed.", low=2, default=Recipe.seqlen
)
@options.count_flag("--batch-size", MEASURE, "Windows per forward pass.", default=1)
@options.json_flag
@click.pass_context
def compare(ctx: click.Context, /, first: str, second: str, as_json: bool, **flags: Any) -> None:
    """Compare two models: common zeros, size, perplexity and speed.

    A and B are named like --model of the other commands: for example two pruned models, or a pruned model and its
    original. If their shapes differ, only sizes are compared.
    """
    for note in _without_effect(flags, set(options.given(ctx, flags))):
        warn(note)
    with Stages() as stages:
        from neuronrank_torch.runs.compare import CompareJob, run_compare
        from neuronrank_torch.runs.job import Evaluation

        evaluation = Evaluation(flags["eval_dataset"], flags["seqlen"], flags["eval_windows"], flags["bos"])
        job = CompareJob(
            (first, second),
            evaluation if flags["evaluate"] else None,
            flags["seqlen"] if flags["speed"] else None,
            **{name: flags[name] for name in ("device", "dtype", "batch_size")},
        )
        result = run_compare(job, stages)
    for note in result.notes:
        warn(note)
    show(result, as_json, partial(print_comparison, dataset=flags["eval_dataset"]))


def _without_effect(flags: dict[str, Any], chosen: set[str]) -> list[str]:
    """Warnings about flags that have no effect without another one."""
    idle: dict[str, str] = {}
    if not flags["evaluate"]:
        idle |= dict.fromkeys(("eval_dataset", "eval_windows", "bos"), "--eval")
        if not flags["speed"]:
            idle |= dict.fromkeys(("seqlen", "batch_size"), "--eval or --speed")
    return [f"--{name.replace('_', '-')} has no effect without {idle[name]}" for name in sorted(chosen & idle.keys())]


def print_comparison(result: CompareResult, dataset: str) -> None:
    """Print the overlap by layer and module, then the figures of both models."""
    a, b = result.models
    click.echo(f"A: {a.model}\nB: {b.model}")
    if result.layers:
        click.echo("by module: weights that are zero in both / in either; and the share of weights that both keep:")
        Console().print(_overlap_table(result))
    Console().print(_figures_table(a, b))
    if a.perplexity:
        click.echo(f"perplexity measured on: {protocol(dataset, a.perplexity)}")


def _overlap_table(result: CompareResult) -> Table:
    headings = (name.removesuffix("_proj") for name in result.modules)
    table = right_aligned("layer", *headings, "both keep", no_wrap=True)

    def cells(name: str, modules: dict[str, Overlap]) -> list[str]:
        size = sum(m.size for m in modules.values())
        kept = sum(m.size * m.kept_in_both for m in modules.values()) / size
        jaccard = [f"{modules[name].jaccard:.3f}" if name in modules else "" for name in result.modules]
        return [name, *jaccard, f"{kept:.2%}"]

    for layer in result.layers:
        table.add_row(*cells(str(layer.layer), layer.modules))
    table.add_section()
    table.add_row(*cells("all", result.modules), style="bold")
    return table


def _figures_table(a: ModelFigures, b: ModelFigures) -> Table:
    table = right_aligned("", "A", "B", left=("",))
    rows: dict[str, Callable[[ModelFigures], str]] = {
        "size on disk": lambda m: size_text(m.bytes),
        "parameters": lambda m: f"{m.parameters:,}",
        "not zero": lambda m: f"{m.nonzero:,}",
        "zero": lambda m: f"{1 - m.nonzero / m.parameters:.2%}",
    }
    if a.perplexity:
        rows["perplexity"] = lambda m: f"{m.perplexity.perplexity:.4f}" if m.perplexity else ""
    if a.tokens_per_second:
        rows["tokens per second"] = lambda m: f"{m.tokens_per_second:,.0f}"
    for name, figure in rows.items():
        table.add_row(name, figure(a), figure(b))
    return table
