"""The ``neuronrank`` command: ties the commands together and turns errors into one line, a hint and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from neuronrank_cli.evaluate import evaluate
from neuronrank_cli.prune import prune
from neuronrank_core import NeuronRankError, __version__


def dashed(token: str) -> str:
    """Make underscores and dashes in flags interchangeable."""
    return token.replace("_", "-")


class ErrorsInOneLine(click.Group):
    """A group whose commands never show a user a traceback for an error raised on purpose."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, exit 1 for a run that failed and 2 for wrong input."""
        try:
            return super().invoke(ctx)
        except NeuronRankError as error:
            click.echo(f"Error: {error}", err=True)
            if error.hint:
                click.echo(f"Hint: {error.hint}", err=True)
            ctx.exit(error.exit_code)


@click.group(
    cls=ErrorsInOneLine,
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

    Underscores and dashes in flags are interchangeable. Every flag can also be set in the environment:
    --sparsity_ratio of `neuronrank prune` as NEURONRANK_PRUNE_SPARSITY_RATIO.
    """


cli.add_command(prune)
cli.add_command(evaluate)


def main(run: Callable[..., Any] = cli) -> None:
    """Entry point."""
    sys.exit(run())
