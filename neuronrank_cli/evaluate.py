"""``neuronrank eval``."""

from __future__ import annotations

from typing import Any

import click

from neuronrank_cli.command import Command, Flag
from neuronrank_cli.console import Stages, print_json, protocol
from neuronrank_cli.options import BOS, BOS_HELP, Name, count_flag, json_flag, model_flags, text_flag, windows_flag
from neuronrank_core.recipe import Recipe

WHAT = "What to measure on"


@click.command("eval", cls=Command)
@model_flags
@text_flag("--dataset", WHAT, "Text")
@windows_flag("--windows", WHAT)
@count_flag("--seqlen", WHAT, "Tokens in a window.", low=2, default=Recipe.seqlen)
@click.option("--bos", cls=Flag, section=WHAT, type=Name(BOS), default=Recipe.bos, help=BOS_HELP)
@count_flag("--batch-size", WHAT, "Windows in a forward pass.", default=1)
@json_flag
def evaluate(model: str, device: str, dtype: Any, batch_size: int, as_json: bool, **how: Any) -> None:
    """Measure perplexity, and say on what.

    The text is tokenised as one string and cut in consecutive windows of --seqlen tokens; the remainder is dropped.
    """
    with Stages() as stages:
        from neuronrank_torch.job import Evaluation, run_eval

        measured = run_eval(
            model, Evaluation(**how), device=device, dtype=dtype, batch_size=batch_size, on_stage=stages
        ).to_dict()
    if as_json:
        print_json({"model": model, "dataset": how["dataset"], **measured})
    else:
        click.echo(f"perplexity: {measured['perplexity']:.4f}")
        click.echo(f"measured on: {protocol(how['dataset'], measured)}")
