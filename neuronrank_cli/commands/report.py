"""``neuronrank report``."""

from typing import Any

import click

from neuronrank_cli.command import OUTPUT, Command
from neuronrank_cli.console import Stages, print_json, say, size_text
from neuronrank_cli.options import (
    count_flag,
    device_flags,
    flag,
    json_flag,
    model_flag,
    recipe_flags,
    text_flag,
    warn_of_idle,
)
from neuronrank_cli.output_file import check_output_file

STATISTICS, PREDICTIONS, TEXT = "Statistics", "Predictions", "Generated text"
#: Fields of the recipe that apply when statistics are read, and their defaults in words.
_READING = {"tfidf_mode": "as in the run, or topic", "tfidf_k": "as in the run", "q_active": "as in the run"}


@click.command(cls=Command)
@click.argument("folder")
@model_flag("Original model, before pruning.", default_text="the model of the run")
@device_flags
@flag(
    "--stats",
    STATISTICS,
    "Folder written by `neuronrank collect` for the original model. Without it, some sections are left out.",
    metavar="FOLDER",
)
@text_flag("--dataset", STATISTICS, "Text of the statistics", None, default_text="as recorded there")
@recipe_flags("TF and IDF", _READING, STATISTICS, unset=_READING)
@count_flag("--layers", STATISTICS, "Number of layers to show in detail.", default=6)
@count_flag(
    "--eval-windows",
    PREDICTIONS,
    "Windows of the run's evaluation text on which to compare predictions with the original model's; 0 leaves it out.",
    low=0,
    default_text="as in the run",
)
@flag(
    "--prompt",
    TEXT,
    "Prompt to continue. Can be repeated.",
    into="prompts",
    multiple=True,
    metavar="TEXT",
    default_text="three short prompts",
)
@count_flag("--new-tokens", TEXT, "Tokens to generate; 0 leaves out the section.", low=0, default=40)
@flag("--save", OUTPUT, "Output file.", metavar="FILE", default="report.html")
@flag("--force", OUTPUT, "Replace an existing file.", is_flag=True)
@json_flag
@click.pass_context
def report(ctx: click.Context, /, save: str, force: bool, as_json: bool, prompts: tuple[str, ...], **how: Any) -> None:
    """Write an HTML page about a pruned model and its neurons or experts.

    FOLDER is the output of `neuronrank prune --save`. The page does not load anything from the network and contains no
    scripts. Sections without input say which flag is missing.
    """
    file = check_output_file(save, force=force, example="report.html")
    if how["stats"] is None:
        warn_of_idle(ctx, dict.fromkeys(("dataset", *_READING, "layers"), "without --stats"))
    if not how["new_tokens"]:
        warn_of_idle(ctx, {"prompts": "with --new-tokens 0"})
    how["tfidf"] = {name: value for name in _READING if (value := how.pop(name)) is not None}
    if prompts:
        how["prompts"] = prompts
    with Stages() as stages:
        from neuronrank_cli.page.render import render
        from neuronrank_torch.files.durable import write_durably
        from neuronrank_torch.runs.page.gather import gather
        from neuronrank_torch.runs.page.sources import InsightJob

        data = gather(InsightJob(**how), stages)
        page = render(data).encode()
        write_durably(file, lambda path: path.write_bytes(page))
    if as_json:
        print_json({**data, "saved": str(file)})
    else:
        say(f"saved to: {save} ({size_text(len(page))})")
