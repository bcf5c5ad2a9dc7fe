"""``neuronrank eval``."""

from __future__ import annotations

from typing import Any

import click

from neuronrank_cli.console import Stages, print_json, protocol
from neuronrank_cli.options import batch_size_option, bos_option, json_option, model_options, seqlen_option


@click.command("eval")
@model_options
@click.option("--dataset", default="builtin", help="Text: builtin, a .txt or .jsonl file, or a datasets-hub name.")
@seqlen_option
@click.option("--windows", type=click.IntRange(min=1), help="How many windows.  [default: all]", show_default=False)
@bos_option
@batch_size_option
@json_option
def evaluate(model: str, device: str, dtype: Any, batch_size: int | None, as_json: bool, **protocol_of: Any) -> None:
    """Measure perplexity, and say on what.

    The text is tokenised as one string and cut in consecutive windows of --seqlen tokens; the remainder is dropped.
    """
    from neuronrank_torch.job import Evaluation, run_eval

    with Stages() as stages:
        measured = run_eval(
            model,
            Evaluation(**protocol_of),
            device=device,
            dtype=dtype,
            batch_size=batch_size or 1,
            on_stage=stages,
        ).to_dict()
    if as_json:
        print_json({"model": model, "dataset": protocol_of["dataset"], **measured})
    else:
        click.echo(f"perplexity: {measured['perplexity']:.4f}")
        click.echo(f"measured on: {protocol(protocol_of['dataset'], measured)}")
