"""``neuronrank verify``."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.table import Table

from neuronrank_cli.command import Command
from neuronrank_cli.console import Stages, print_json
from neuronrank_cli.options import count_flag, json_flag, model_flags, text_flag

WHAT = "What to compare on"


@click.command(cls=Command)
@model_flags
@text_flag("--dataset", WHAT, "Text")
@count_flag("--nsamples", WHAT, "Number of sequences.", default=4)
@count_flag("--seqlen", WHAT, "Tokens in a sequence.", low=2, default=128)
@count_flag("--layers", WHAT, "How many layers, from the first.", default_text="all")
@count_flag("--batch-size", WHAT, "Sequences in a micro-batch.", default=1)
@count_flag("--seed", WHAT, "Seed of every random number.", low=0, default=0)
@json_flag
@click.pass_context
def verify(ctx: click.Context, /, model: str, as_json: bool, **how: Any) -> None:
    """Check that torch on this device computes what the NumPy reference does; exit 1 where it does not.

    For a new GPU or torch version. From the activations of each layer both sides work out statistics, topics, scores
    and masks. Real values have to agree to 1e-5 relative; counts, labels and masks have to be equal, but for choices
    that are nearly ties in the reference. In half precision a second run, in float32, says what the precision costs.
    """
    with Stages() as stages:
        from neuronrank_torch.runs.verify.run import run_verify

        result = run_verify(model, **how, progress=stages)
    if as_json:
        print_json(result)
    else:
        print_result(result)
    if not result["holds"]:
        ctx.exit(1)


def print_result(result: dict[str, Any]) -> None:
    """Print the worst of each quantity over the layers, the verdict, and what half precision costs."""
    layers = result["layers"]
    table = _table("quantity", "worst", "in layer", "near-ties", "margin", "verdict")
    for name in layers[0]["checks"]:
        rows = [(layer["checks"][name], layer["layer"]) for layer in layers]
        # Of equals the one that compared least: a layer whose topics could not be held to anything shows.
        worst, where = max(rows, key=lambda row: (row[0]["worst"], -row[0]["size"]))
        margin = max(check["margin"] for check, _ in rows)
        near_ties = sum(check["near_ties"] for check, _ in rows)
        table.add_row(
            _shown(name),
            f"{worst['worst']:.1e}" if worst["limit"] else f"{worst['worst']:,} of {worst['size']:,}",
            str(where),
            f"{near_ties:,}" if near_ties else "",
            f"{margin:.1e}" if margin else "",
            "holds" if all(check["holds"] for check, _ in rows) else "BROKEN",
        )
    click.echo(
        f"{result['model']} on {result['device']} in {result['dtype']}, {result['nsamples']} sequences of "
        f"{result['seqlen']} tokens of {result['dataset']}, {len(layers)} layers, torch {result['versions']['torch']}"
    )
    Console().print(table)
    if result["cost"]:
        _print_cost(result)
    broken = [str(layer["layer"]) for layer in layers if not all(check["holds"] for check in layer["checks"].values())]
    click.echo(f"verdict: BROKEN in layer {', '.join(broken)}" if broken else "verdict: the contract holds")


def _print_cost(result: dict[str, Any]) -> None:
    """Print how far half precision is from float32."""
    click.echo(f"What {result['dtype']} changes: statistics, and masks of the default method, against a run in float32")
    table = _table("quantity", "mean", "worst", "in layer")
    for name in sorted(result["cost"][0]["changed"]):
        rows = [(layer["changed"][name], layer["layer"]) for layer in result["cost"]]
        worst, where = max(rows)
        table.add_row(_shown(name), f"{sum(value for value, _ in rows) / len(rows):.2%}", f"{worst:.2%}", str(where))
    Console().print(table)


def _table(*headings: str) -> Table:
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("quantity", "verdict") else "right", no_wrap=True)
    return table


def _shown(name: str) -> str:
    """Short enough for 80 columns."""
    return name.replace("input_mean_square.", "input of ")
