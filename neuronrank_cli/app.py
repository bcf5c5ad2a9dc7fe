"""The ``neuronrank`` command: ties the commands together."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType

import click

from neuronrank_cli.command import speaks
from neuronrank_cli.commands.collect import collect
from neuronrank_cli.commands.compare import compare
from neuronrank_cli.commands.config import config
from neuronrank_cli.commands.evaluate import evaluate
from neuronrank_cli.commands.merge import merge
from neuronrank_cli.commands.prune import prune
from neuronrank_cli.commands.report import report
from neuronrank_cli.commands.tune import tune
from neuronrank_cli.commands.verify import verify
from neuronrank_core import __version__


def dashed(token: str) -> str:
    """Make underscores and dashes in flags interchangeable."""
    return token.replace("_", "-")


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "NEURONRANK",
        "token_normalize_func": dashed,
        "show_default": True,
        "max_content_width": 110,
    },
)
@click.version_option(__version__, prog_name="neuronrank")
def cli() -> None:
    """Prune language models by how strongly (TF) and how selectively (IDF) their neurons fire.

    Underscores and dashes are interchangeable in the names of flags and methods. Every flag can also be set in the
    environment: --sparsity_ratio of `neuronrank prune` as NEURONRANK_PRUNE_SPARSITY_RATIO.

    Results go to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 the run failed, 2 wrong input.
    NEURONRANK_DEBUG=1 shows tracebacks.
    """


cli.add_command(prune)
cli.add_command(evaluate)
cli.add_command(collect)
cli.add_command(merge)
cli.add_command(tune)
cli.add_command(config)
cli.add_command(verify)
cli.add_command(report)
cli.add_command(compare)


def main() -> None:
    """Entry point."""
    # Batch systems end a run by SIGTERM: unwind as for Ctrl-C, so that no temporary folder stays.
    signal.signal(signal.SIGTERM, _terminate)
    with ExitStack() as stack:
        if not speaks():
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        cli()


def _terminate(number: int, frame: FrameType | None) -> None:
    del frame
    raise SystemExit(128 + number)
