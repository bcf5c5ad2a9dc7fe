"""``neuronrank compare``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from neuronrank_cli.command import Command, Flag
from neuronrank_cli.console import Stages, print_json, protocol, size_text, warn
from neuronrank_cli.options import (
    BOS,
    BOS_HELP,
    Name,
    count_flag,
    device_flags,
    given,
    json_flag,
    text_flag,
    windows_flag,
)
from neuronrank_core.recipe import Recipe

MEASURE = "Perplexity and speed"


@click.command(cls=Command)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@device_flags
@click.option("--eval", "evaluate", cls=Flag, section=MEASURE, is_flag=True, help="Measure the perplexity of each.")
@text_flag("--eval-dataset", MEASURE, "Text")
@windows_flag("--eval-windows", MEASURE)
@click.option("--bos", cls=Flag, section=MEASURE, type=Name(BOS), default=Recipe.bos, help=BOS_HELP)
@click.option("--speed", cls=Flag, section=MEASURE, is_flag=True, help="Measure tokens per second of a forward pass.")
@count_flag("--seqlen", MEASURE, "Tokens in a window, and in a forward pass.", low=2, default=Recipe.seqlen)
@count_flag("--batch-size", MEASURE, "Windows in a forward pass.", default=1)
@json_flag
@click.pass_context
def compare(ctx: click.Context, /, first: str, second: str, as_json: bool, **flags: Any) -> None:
    """Compare two models: which weights both have set to zero, and what they cost.

    A and B are pruned models, or a pruned one and the model it was made from: anything that --model of the other
    commands takes. Of models with other shapes, sizes alone are compared.
    """
    for note in _without_effect(flags, set(given(ctx, flags))):
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
    for note in result["notes"]:
        warn(note)
    if as_json:
        print_json(result)
    else:
        print_comparison(result, flags)


def _without_effect(flags: dict[str, Any], chosen: set[str]) -> list[str]:
    """Flags that the user set and that do nothing without another."""
    idle: dict[str, str] = {}
    if not flags["evaluate"]:
        idle |= dict.fromkeys(("eval_dataset", "eval_windows", "bos"), "--eval")
        if not flags["speed"]:
            idle |= dict.fromkeys(("seqlen", "batch_size"), "--eval or --speed")
    return [f"--{name.replace('_', '-')} has no effect without {idle[name]}" for name in sorted(chosen & idle.keys())]


def print_comparison(result: dict[str, Any], flags: dict[str, Any]) -> None:
    """Print the overlap by layer and module, then the two models' figures."""
    a, b = result["models"]
    click.echo(f"A: {a['model']}\nB: {b['model']}")
    if result["layers"]:
        click.echo("weights that are zero in both / in either, by module, and share of weights that both keep:")
        Console().print(_overlap_table(result))
    Console().print(_figures_table(a, b))
    if "perplexity" in a:
        click.echo(f"perplexity on: {protocol(flags['eval_dataset'], a['perplexity'])}")


def _overlap_table(result: dict[str, Any]) -> Table:
    table = Table()
    for heading in ("layer", *(name.removesuffix("_proj") for name in result["modules"]), "both keep"):
        table.add_column(heading, justify="right", no_wrap=True)

    def cells(name: str, modules: dict[str, Any]) -> list[str]:
        size = sum(m["size"] for m in modules.values())
        kept = sum(m["size"] * m["kept_in_both"] for m in modules.values()) / size
        jaccard = [f"{modules[name]['jaccard']:.3f}" if name in modules else "" for name in result["modules"]]
        return [name, *jaccard, f"{kept:.2%}"]

    for layer in result["layers"]:
        table.add_row(*cells(str(layer["layer"]), layer["modules"]))
    table.add_section()
    table.add_row(*cells("all", result["modules"]), style="bold")
    return table


def _figures_table(a: dict[str, Any], b: dict[str, Any]) -> Table:
    table = Table()
    for heading in ("", "A", "B"):
        table.add_column(heading, justify="right" if heading else "left")
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "size on disk": lambda m: size_text(m["bytes"]),
        "parameters": lambda m: f"{m['parameters']:,}",
        "not zero": lambda m: f"{m['nonzero']:,}",
        "zero": lambda m: f"{1 - m['nonzero'] / m['parameters']:.2%}",
    }
    if "perplexity" in a:
        rows["perplexity"] = lambda m: f"{m['perplexity']['perplexity']:.4f}"
    if "tokens_per_second" in a:
        rows["tokens per second"] = lambda m: f"{m['tokens_per_second']:,.0f}"
    for name, figure in rows.items():
        table.add_row(name, figure(a), figure(b))
    return table
