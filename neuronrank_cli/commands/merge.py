"""``neuronrank merge``."""

from __future__ import annotations

import click

from neuronrank_cli.command import OUTPUT, Command, Flag
from neuronrank_cli.commands.collect import print_statistics
from neuronrank_cli.console import Stages, print_json
from neuronrank_cli.options import force_flag, json_flag


@click.command(cls=Command)
@click.argument("folders", nargs=-1, required=True)
@click.option("--save", cls=Flag, section=OUTPUT, metavar="FOLDER", required=True, help="Where to save.")
@force_flag("statistics that are saved there")
@json_flag
def merge(folders: tuple[str, ...], save: str, force: bool, as_json: bool) -> None:
    """Unite statistics of disjoint documents, collected apart with --documents, in FOLDERS.

    The result is what one collection of them all gives, bit for bit. All have to be of one model, text and sampling.
    """
    with Stages() as stages:
        from neuronrank_torch.runs.merge import run_merge

        header = run_merge(folders, save, force=force, progress=stages)
    if as_json:
        print_json(header)
    else:
        print_statistics(header, save)
