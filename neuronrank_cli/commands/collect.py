"""``neuronrank collect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from neuronrank_cli import options
from neuronrank_cli.command import OUTPUT, Command
from neuronrank_cli.console import Stages, say, show
from neuronrank_core.recipe import Recipe

if TYPE_CHECKING:
    from neuronrank_torch.runs.collect import CollectResult

TEXT, STATISTICS = "Text", "Statistics"
EXAMPLE = """\b
Example, in two parts:
  neuronrank collect --model MODEL --nsamples 32 --documents 0:16 --save a/
  neuronrank collect --model MODEL --nsamples 32 --documents 16:32 --save b/
  neuronrank merge a/ b/ --save stats/
  neuronrank prune --model MODEL --stats stats/ --save out/
"""


def from_to(value: str) -> tuple[int, int]:
    """Split ``FROM:TO``. The numbers are checked later."""
    first, colon, last = value.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise click.BadParameter(f"{value!r} is not FROM:TO, two whole numbers.")
    return int(first), int(last)


@click.command(cls=Command, epilog=EXAMPLE)
@options.model_flags
@options.calibration_flag(TEXT)
@options.recipe_flags("Calibration", ("nsamples",), TEXT)
@options.count_flag("--seqlen", TEXT, "Tokens per sequence.", low=2, default=Recipe.seqlen)
@options.recipe_flags("Calibration", ("bos", "seed"), TEXT)
@options.flag(
    "--documents",
    TEXT,
    "Range of the --nsamples sequences to collect, from 0, without TO.",
    type=from_to,
    metavar="FROM:TO",
    default_text="all",
)
@options.count_flag("--batch-size", TEXT, "Sequences per micro-batch.", default_text="about 2048 tokens")
@options.recipe_flags("TF and IDF", ("signal", "threshold", "tokens_per_document"), STATISTICS)
@options.flag("--save", OUTPUT, "Output folder.", metavar="FOLDER", required=True)
@options.force_flag("existing statistics with all files there")
@options.hidden_states_flag
@options.json_flag
@click.pass_context
def collect(ctx: click.Context, /, as_json: bool, documents: tuple[int, int] | None, **flags: Any) -> None:
    """Collect statistics from which every method can prune.

    Runs the unpruned model and writes a table for each layer, with a row for each sequence. `neuronrank prune --stats`
    then prunes with any method in seconds, without a text. If interrupted, rerun the same command to resume.
    """
    recipe = options.recipe_of(ctx, flags)
    with Stages() as stages:
        from neuronrank_torch.runs.collect import run_collect
        from neuronrank_torch.runs.job import Job

        result = run_collect(Job(**options.fields_of(Job, flags)), recipe, documents, stages)
    options.warn_of_signal(ctx, recipe.signal, result.signal)
    show(result, as_json, print_statistics)


def print_statistics(result: CollectResult) -> None:
    """Print what was collected, and the folder."""
    say(
        f"{result.model}: {result.layers} layers, {len(result.documents)} of {result.nsamples} sequences of "
        f"{result.seqlen} tokens of {result.dataset}, "
        + ("experts (for --sparsity_type experts)" if result.experts else f"signal {result.signal}")
    )
    say(f"saved to: {result.save}")
