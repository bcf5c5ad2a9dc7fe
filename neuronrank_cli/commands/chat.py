"""``neuronrank chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from neuronrank_cli import options
from neuronrank_cli.command import Command
from neuronrank_cli.console import Stages, print_json, warn
from neuronrank_core import InputError

if TYPE_CHECKING:
    from neuronrank_torch.runs.chat import Turn

TEXT = "Generated text"
EXAMPLE = """\b
Example:
  echo "The capital of France is" | \\
      neuronrank chat builtin:smollm2-135m out/smollm2-50
"""


@click.command(cls=Command, epilog=EXAMPLE)
@click.argument("first", metavar="A")
@click.argument("second", metavar="[B]", required=False)
@options.device_flags
@options.count_flag("--max-new-tokens", TEXT, "Largest number of tokens of an answer.", default=128, into="new_tokens")
@options.flag(
    "--temperature", TEXT, "0 always takes the most likely token; above, tokens are drawn.", type=float, default=0.0
)
@options.count_flag("--seed", TEXT, "Random seed of --temperature.", low=0, default=0)
@options.json_flag
@click.pass_context
def chat(ctx: click.Context, /, first: str, second: str | None, as_json: bool, **how: Any) -> None:
    """Talk to a model, or to two side by side.

    A and B are named like --model of the other commands: for example an original and its pruned model. Prompts are
    read from the terminal until Ctrl-D, or from stdin, one per line. A model with a chat template answers in a
    conversation; any other continues each prompt.
    """
    if not how["temperature"]:
        options.warn_of_idle(ctx, {"seed": "without --temperature"})
    with Stages() as stages:
        from neuronrank_torch.runs.chat import Chat, ChatResult

        talk = Chat(tuple(filter(None, (first, second))), **how, progress=stages)
    for note in talk.notes:
        warn(note)
    turns: list[Turn] = []
    ended = False
    try:
        for turn in talk.turns(_prompts()):
            turns.append(turn)
            if not as_json:
                _print_turn(turn, talk.models)
        if not turns and not sys.stdin.isatty():
            raise InputError("there is no prompt on stdin", hint="give one per line")
        ended = True
    finally:  # Also what was said before a prompt that failed.
        if as_json and (turns or ended):
            print_json(ChatResult(talk.models, tuple(turns), talk.notes))


def _prompts() -> Iterator[str]:
    """Lines from the terminal or from stdin, without empty ones."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise InputError(f"stdin is not {sys.stdin.encoding} text: {error}", hint="convert it") from error
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _print_turn(turn: Turn, models: tuple[str, ...]) -> None:
    """Print the answers side by side on a terminal, and one after another elsewhere."""
    answers, console = [text.strip() for text in turn.answers], Console(markup=False, emoji=False, highlight=False)
    if not sys.stdin.isatty():
        click.echo(f"> {turn.prompt}")
    if console.is_terminal and len(answers) > 1:
        table = Table(expand=True)
        for name in models:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*answers)
        console.print(table)
    else:
        for letter, text in zip("AB", answers, strict=False):
            click.echo(f"{letter}: {text}" if len(answers) > 1 else text)
