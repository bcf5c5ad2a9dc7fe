"""``neuronrank verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from neuronrank_cli.command import Command
from neuronrank_cli.console import Stages, print_table, say, show
from neuronrank_cli.options import count_flag, json_flag, model_flags, text_flag

if TYPE_CHECKING:
    from neuronrank_torch.runs.verify.verify_result import VerifyResult

TEXT = "Text"


@click.command(cls=Command)
@model_flags
@text_flag("--dataset", TEXT, "Text to run the model on")
@count_flag("--nsamples", TEXT, "Number of sequences.", default=4)
@count_flag("--seqlen", TEXT, "Tokens per sequence.", low=2, default=128)
@count_flag("--layers", TEXT, "Number of layers to check, from the first.", default_text="all")
@count_flag("--batch-size", TEXT, "Sequences per micro-batch.", default=1)
@count_flag("--seed", TEXT, "Random seed.", low=0, default=0)
@json_flag
@click.pass_context
def verify(ctx: click.Context, /, model: str, as_json: bool, **how: Any) -> None:
    """Check that torch on this device agrees with the reference.

    Use it on a new GPU or torch version. Exits with 1 if torch and the NumPy reference differ. Only for models
    with one gated MLP per layer.

    Both sides compute statistics, topics, scores and masks from the same activations of each layer. Real values have
    to agree within a relative error of 1e-5; counts, labels and masks have to be equal, except for near-ties in the
    reference. In half precision, a second run in float32 measures the loss of precision.
    """
    with Stages() as stages:
        from neuronrank_torch.runs.verify.run import run_verify

        result = run_verify(model, **how, progress=stages)
    show(result, as_json, print_verdict)
    if not result.holds:
        ctx.exit(1)


def print_verdict(result: VerifyResult) -> None:
    """Print the largest deviation of each quantity over the layers, the verdict, and the loss of precision."""
    layers = result.layers
    table = []
    for name in layers[0].checks:
        rows = [(layer.checks[name], layer.layer) for layer in layers]
        # Of equal deviations, the check that compared least, so that a layer without comparable topics is shown.
        worst, where = max(rows, key=lambda row: (row[0].worst, -row[0].size))
        margin = max(check.margin for check, _ in rows)
        near_ties = sum(check.near_ties for check, _ in rows)
        row = [
            _shown(name),
            f"{worst.worst:.1e}" if worst.limit else f"{worst.worst:,} of {worst.size:,}",
            str(where),
            f"{near_ties:,}" if near_ties else "",
            f"{margin:.1e}" if margin else "",
            "holds" if all(check.holds for check, _ in rows) else "BROKEN",
        ]
        table.append(row)
    say(
        f"{result.model} on {result.device} in {result.dtype}, {result.nsamples} sequences of {result.seqlen} tokens "
        f"of {result.dataset}, {len(layers)} layers, torch {result.versions['torch']}"
    )
    headings = ("quantity", "worst", "in layer", "near-ties", "margin", "verdict")
    print_table(headings, table, left=("quantity", "verdict"))
    if result.cost:
        _print_cost(result)
    broken = [str(layer.layer) for layer in layers if not all(check.holds for check in layer.checks.values())]
    say(f"verdict: BROKEN in layer {', '.join(broken)}" if broken else "verdict: the contract holds")


def _print_cost(result: VerifyResult) -> None:
    """Print how much half precision differs from float32."""
    say(f"Difference between {result.dtype} and float32, in statistics and in masks of the default method:")
    table = []
    for name in sorted(result.cost[0].changed):
        rows = [(layer.changed[name], layer.layer) for layer in result.cost]
        worst, where = max(rows)
        mean = sum(value for value, _ in rows) / len(rows)
        table.append([_shown(name), f"{mean:.2%}", f"{worst:.2%}", str(where)])
    print_table(("quantity", "mean", "worst", "in layer"), table, left=("quantity",))


def _shown(name: str) -> str:
    """Short enough for 80 columns."""
    return name.replace("input_mean_square.", "input of ")
