"""``neuronrank report``."""

from typing import Any

import click

from neuronrank_cli import options
from neuronrank_cli.command import OUTPUT, Command
from neuronrank_cli.console import Stages, print_json, size_text
from neuronrank_cli.options import RECIPE_FLAGS, count_flag, device_flags, json_flag, model_flag, text_flag
from neuronrank_cli.output_file import check_output_file

STATISTICS, TEXT = "Statistics", "Generated text"
#: Fields of the recipe that apply when statistics are read, and their defaults in words.
_READING = {"tfidf_mode": "as in the run, or topic", "tfidf_k": "as in the run", "q_active": "as in the run"}


def reading_flags(command: Any) -> Any:
    """Add the flags of TF and IDF that can be changed after collection."""
    for spec in reversed([spec for spec in RECIPE_FLAGS["TF and IDF"] if spec.field in _READING]):
        command = options.flag(
            spec.flag, spec.field, section=STATISTICS, type=spec.kind, help=spec.help, default_text=_READING[spec.field]
        )(command)
    return command


@click.command(cls=Command)
@click.argument("folder")
@model_flag("Original model, before pruning.", default_text="the model of the run")
@device_flags
@options.flag(
    "--stats",
    section=STATISTICS,
    metavar="FOLDER",
    help="Folder written by `neuronrank collect` for the original model. Without it, some sections are left out.",
)
@text_flag("--dataset", STATISTICS, "Text of the statistics", None, default_text="as recorded there")
@reading_flags
@count_flag("--layers", STATISTICS, "Number of layers to show in detail.", default=6)
@options.flag(
    "--prompt",
    "prompts",
    section=TEXT,
    multiple=True,
    metavar="TEXT",
    help="Prompt to continue. Can be repeated.",
    default_text="three short prompts",
)
@count_flag("--new-tokens", TEXT, "Tokens to generate; 0 leaves out the section.", low=0, default=40)
@options.flag("--save", section=OUTPUT, metavar="FILE", default="report.html", help="Output file.")
@options.flag("--force", section=OUTPUT, is_flag=True, help="Replace an existing file.")
@json_flag
def report(save: str, force: bool, as_json: bool, prompts: tuple[str, ...], **how: Any) -> None:
    """Write an HTML page about a pruned model and its neurons.

    FOLDER is the output of `neuronrank prune --save`. The page does not load anything from the network and contains no
    scripts. Sections without input say which flag is missing.
    """
    file = check_output_file(save, force=force, example="report.html")
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
        click.echo(f"saved to: {save} ({size_text(len(page))})")
