"""``neuronrank report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuronrank_cli.command import OUTPUT, Command, Flag
from neuronrank_cli.console import Stages, print_json, size_text
from neuronrank_cli.options import RECIPE_FLAGS, count_flag, device_flags, json_flag, model_flag, text_flag
from neuronrank_core import InputError

STATISTICS, TEXT = "Statistics", "Generated text"
#: Fields of the recipe that say how statistics are read, and their defaults in words.
_READING = {"tfidf_mode": "the run's, or topic where it has none", "tfidf_k": "the run's", "q_active": "the run's"}


def reading_flags(command: Any) -> Any:
    """Add the flags of TF and IDF that can change after collection."""
    for spec in reversed([spec for spec in RECIPE_FLAGS["TF and IDF"] if spec.field in _READING]):
        command = click.option(
            spec.flag,
            spec.field,
            cls=Flag,
            section=STATISTICS,
            type=spec.kind,
            help=spec.help,
            default_text=_READING[spec.field],
        )(command)
    return command


@click.command(cls=Command)
@click.argument("folder")
@model_flag("The model before pruning.", default_text="the one the run names")
@device_flags
@click.option(
    "--stats",
    cls=Flag,
    section=STATISTICS,
    metavar="FOLDER",
    help="Statistics of the model before pruning, from `neuronrank collect`; without them, sections are left out.",
)
@text_flag("--dataset", STATISTICS, "Text they were collected on", None, default_text="the one they name")
@reading_flags
@count_flag("--layers", STATISTICS, "How many layers to show one by one.", default=6)
@click.option(
    "--prompt",
    "prompts",
    cls=Flag,
    section=TEXT,
    multiple=True,
    metavar="TEXT",
    help="What to go on from; may be given several times.",
    default_text="three short ones",
)
@count_flag("--new-tokens", TEXT, "Tokens to generate; 0 leaves the section out.", low=0, default=40)
@click.option(
    "--save",
    cls=Flag,
    section=OUTPUT,
    metavar="FILE",
    default="report.html",
    help="Where to save the page.",
)
@click.option("--force", cls=Flag, section=OUTPUT, is_flag=True, help="Replace a file that is there.")
@json_flag
def report(save: str, force: bool, as_json: bool, prompts: tuple[str, ...], **how: Any) -> None:
    """Show a pruned model and its neurons on one HTML page.

    FOLDER is what `neuronrank prune --save` wrote. The page needs no network and runs no script; a section whose
    inputs are not there says what to give.
    """
    file = check_file(save, force)
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


def check_file(save: str, force: bool) -> Path:
    """Refuse a file that cannot or should not be written, before the work."""
    file = Path(save).expanduser()
    if file.is_dir():
        raise InputError(f"{save} is a folder", hint="name a file in it: --save report.html")
    if file.exists() and not force:
        raise InputError(f"{save} already exists", hint="choose another name, or replace it with --force")
    if not file.parent.is_dir():
        raise InputError(f"cannot write {save}: there is no folder {file.parent}", hint="create it, or choose another")
    return file
