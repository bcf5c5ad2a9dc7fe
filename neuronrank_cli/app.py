"""The ``neuronrank`` command: the group of all commands."""

import io
import os
import signal
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType

import click

from neuronrank_cli.command import Group
from neuronrank_cli.commands.chat import chat
from neuronrank_cli.commands.collect import collect
from neuronrank_cli.commands.compare import compare
from neuronrank_cli.commands.config import config
from neuronrank_cli.commands.evaluate import evaluate
from neuronrank_cli.commands.merge import merge
from neuronrank_cli.commands.prune import prune
from neuronrank_cli.commands.report import report
from neuronrank_cli.commands.sweep import sweep
from neuronrank_cli.commands.tune import tune
from neuronrank_cli.commands.verify import verify
from neuronrank_cli.config_file import dashed
from neuronrank_core import __version__
from neuronrank_torch.distributed import launcher


@click.group(
    cls=Group,
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

    Underscores and dashes are interchangeable in the names of flags and methods. Every flag can also be set by an
    environment variable: NEURONRANK_PRUNE_SPARSITY_RATIO sets --sparsity_ratio of `neuronrank prune`.

    Results are printed on stdout, progress and warnings on stderr. Exit codes: 0 success, 1 failed run, 2 invalid
    input, 130 after Ctrl-C, 143 after SIGTERM. Set NEURONRANK_DEBUG=1 to see tracebacks.
    """


for command in (prune, evaluate, collect, merge, tune, sweep, config, verify, report, compare, chat):
    cli.add_command(command)


def main() -> None:
    """Entry point."""
    # Batch systems end a run with SIGTERM: clean up as after Ctrl-C, so that no temporary folder is left.
    signal.signal(signal.SIGTERM, _terminate)
    with ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):  # In a terminal of another encoding, names of files may not have one.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        if not launcher.first():
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        cli()


def _terminate(number: int, frame: FrameType | None) -> None:
    del frame
    raise SystemExit(128 + number)
