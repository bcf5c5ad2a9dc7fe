"""``neuronrank merge``."""

import click

from neuronrank_cli.command import OUTPUT, Command
from neuronrank_cli.commands.collect import print_statistics
from neuronrank_cli.console import Stages, show
from neuronrank_cli.options import flag, force_flag, json_flag


@click.command(cls=Command)
@click.argument("folders", nargs=-1, required=True)
@flag("--save", OUTPUT, "Output folder.", metavar="FOLDER", required=True)
@force_flag("existing statistics with all files there")
@json_flag
def merge(folders: tuple[str, ...], save: str, force: bool, as_json: bool) -> None:
    """Merge statistics that were collected separately.

    FOLDERS contain statistics of disjoint --documents of the same model, text and sampling. The result is bit for bit
    that of a single collection.
    """
    with Stages() as stages:
        from neuronrank_torch.runs.merge import run_merge

        result = run_merge(folders, save, force=force, progress=stages)
    show(result, as_json, print_statistics)
