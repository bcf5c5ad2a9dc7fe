"""``neuronrank collect``."""

from __future__ import annotations

from typing import Any

import click

from neuronrank_cli.command import OUTPUT, Command, Flag
from neuronrank_cli.console import Stages, print_json
from neuronrank_cli.options import (
    count_flag,
    force_flag,
    hidden_states_flag,
    json_flag,
    model_flags,
    recipe_flags,
    recipe_of,
    text_flag,
)
from neuronrank_core.recipe import Recipe

TEXT, WHAT = "Text", "What to measure"
EXAMPLE = """\b
Example, in two parts:
  neuronrank collect --model MODEL --nsamples 32 --documents 0:16 --save a/
  neuronrank collect --model MODEL --nsamples 32 --documents 16:32 --save b/
  neuronrank merge a/ b/ --save stats/
  neuronrank prune --model MODEL --stats stats/ --prune_method wanda --save out/
"""


def from_to(value: str) -> tuple[int, int]:
    """Split ``FROM:TO``; the numbers are checked against the draw later."""
    first, colon, last = value.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise click.BadParameter(f"{value!r} is not FROM:TO, two whole numbers.")
    return int(first), int(last)


@click.command(cls=Command, epilog=EXAMPLE)
@model_flags
@text_flag("--dataset", TEXT, "Text")
@recipe_flags("Calibration", ("nsamples",), TEXT)
@count_flag("--seqlen", TEXT, "Tokens in a sequence.", low=2, default=Recipe.seqlen)
@recipe_flags("Calibration", ("bos", "seed"), TEXT)
@click.option(
    "--documents",
    cls=Flag,
    section=TEXT,
    type=from_to,
    metavar="FROM:TO",
    default_text="all",
    help="Which of the --nsamples sequences, from 0; TO is not among them.",
)
@count_flag("--batch-size", TEXT, "Sequences in a micro-batch.", default_text="2048 tokens' worth")
@recipe_flags("TF and IDF", ("signal", "threshold", "tokens_per_document"), WHAT)
@click.option("--save", cls=Flag, section=OUTPUT, metavar="FOLDER", required=True, help="Where to save.")
@force_flag("statistics that are saved there")
@hidden_states_flag
@json_flag
@click.pass_context
def collect(ctx: click.Context, /, as_json: bool, documents: tuple[int, int] | None, **flags: Any) -> None:
    """Collect the statistics that every method prunes by, once, on the dense model.

    One table for each layer, with a row for each sequence. With its --stats, `neuronrank prune` then scores by any
    method in seconds, without a text. Saved layer by layer: the same command goes on where it was interrupted.
    """
    recipe = recipe_of(ctx, flags)
    with Stages() as stages:
        from neuronrank_torch.runs.collect import run_collect
        from neuronrank_torch.runs.job import Job

        names = ("model", "dataset", "save", "force", "device", "dtype", "batch_size", "hidden_states")
        header = run_collect(Job(**{name: flags[name] for name in names}), recipe, documents, stages)
    if as_json:
        print_json(header)
    else:
        print_statistics(header, flags["save"])


def print_statistics(header: dict[str, Any], save: str) -> None:
    """Print what was collected, and where it is."""
    documents = len(header["documents"])
    click.echo(
        f"{header['model']}: {header['layers']} layers, {documents} of {header['nsamples']} sequences of "
        f"{header['seqlen']} tokens of {header['dataset']}, signal {header['signal']}"
    )
    click.echo(f"saved to: {save}")
