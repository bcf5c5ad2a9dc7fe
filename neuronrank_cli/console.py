"""Output for users: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import re
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, redirect_stdout
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from neuronrank_core.measures import Divergence
    from neuronrank_torch.evaluation.perplexity import Perplexity
    from neuronrank_torch.runs.tune.tune_result import Protocol

Printed = TypeVar("Printed")
#: Seconds between two lines about the same activity, where progress is printed as lines.
LINE_SECONDS = 10.0


class _TimeLeft(TimeRemainingColumn):
    """The estimated time left, with a word that tells it from the time elapsed."""

    def render(self, task: Task) -> Text:
        shown = super().render(task)
        return Text(f"{shown} left") if task.total and task.time_remaining is not None else Text("")


class Stages(ExitStack):
    """Shows progress on stderr: a bar on a terminal, plain lines elsewhere. Call it like any ``progress``.

    Plain lines are for log files: one when something else begins, then at most one every :data:`LINE_SECONDS`. While
    it is open, output of libraries goes to stderr too, because stdout is for the result.
    """

    def __init__(self) -> None:
        super().__init__()
        console = Console(stderr=True)
        self.live = console.is_terminal and not console.is_dumb_terminal
        self.bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.fields[steps]}", markup=False, table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            _TimeLeft(),
            console=console,
            transient=True,
            expand=True,
            disable=not self.live,
        )
        self.task = self.bar.add_task("starting", total=None, steps="")
        self.stage = self.activity = ""
        self.printed = 0.0
        #: The notes that were printed already.
        self.noted: list[str] = []

    def note(self, note: str) -> None:
        """Print a note of the result before the work begins."""
        self.noted.append(note)
        warn(note)

    def __enter__(self) -> Stages:
        self.enter_context(redirect_stdout(sys.stderr))
        self.enter_context(self.bar)
        return self

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        """Show where the run is; see :data:`neuronrank_torch.progress.Progress`."""
        activity = re.sub(r"\d+", "", stage)  # Layer 4 of 30 is the same activity as layer 3 of 30.
        if not self.live and stage != self.stage:
            now = time.monotonic()
            if activity != self.activity or now - self.printed >= LINE_SECONDS:
                self.printed = now
                click.echo(stage, err=True)
        if self.live and activity != self.activity:
            self.bar.reset(self.task)  # Its speed says nothing about the new one.
        self.stage, self.activity = stage, activity
        steps = "" if total <= 1 or re.search(r"\d of \d", stage) else f"{done}/{total} {unit}"
        self.bar.update(self.task, description=stage, completed=done, total=total if total > 1 else None, steps=steps)


def fold(text: str, file: IO[str]) -> str:
    """A line as it is printed to a file: on a terminal wrapped at spaces, so that no flag is broken."""
    console = Console(file=file)
    if not console.is_terminal:
        return text
    rest: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": "  "}
    return "\n".join(textwrap.wrap(text, console.width, **rest))


def say(text: str, *, err: bool = False) -> None:
    """Print a line, see :func:`fold`."""
    click.echo(fold(text, sys.stderr if err else sys.stdout), err=err)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    say(f"Warning: {message}", err=True)


def show(result: Printed, as_json: bool, print_text: Callable[[Printed], None], noted: Collection[str] = ()) -> None:
    """Print the notes of a result as warnings, then the result: as JSON, or as text with ``print_text``.

    Notes in ``noted`` were printed before.
    """
    for note in getattr(result, "notes", ()):
        if note not in noted:
            warn(note)
    if as_json:
        print_json(result)
    else:
        print_text(result)


def print_json(value: Any) -> None:
    """Print a value as JSON, with nothing else on stdout."""
    from neuronrank_torch.schema import to_json

    click.echo(json.dumps(to_json(value), indent=2, sort_keys=True, allow_nan=False))


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    total: Sequence[str] = (),
    left: Collection[str] = (),
    rule: bool = True,
) -> None:
    """Print a table whose columns are aligned to the right, except those in ``left``.

    The row ``total`` is bold and comes last, below a line unless ``rule`` is false. No cell is broken or cut: a table
    that is too wide for the terminal has no frame, and if that is not enough, its lines are longer.
    """
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if total:
        if rule:
            table.add_section()
        table.add_row(*total, style="bold")
    console = Console(markup=False, emoji=False)  # Square brackets are not markup here.
    endless = console.options.update(max_width=10**4)
    if console.measure(table, options=endless).maximum > console.width:
        table.box, table.padding, table.pad_edge = SIMPLE_HEAD, (0, 1, 0, 0), False
    console.width = max(console.width, console.measure(table, options=endless).maximum)
    console.print(table)


def size_text(size: int) -> str:
    """A number of bytes with its unit."""
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def decimal(value: float) -> str:
    """A perplexity, or its error, with four decimals; of a model that predicts nothing, only its size."""
    return f"{value:.4f}" if value < 1e6 else f"{value:.4g}"


def perplexity_text(measured: Perplexity) -> str:
    """A perplexity with its standard error."""
    if measured.standard_error is None:
        return decimal(measured.perplexity)
    return f"{decimal(measured.perplexity)} (standard error {decimal(measured.standard_error)})"


def kl_texts(measured: Divergence) -> tuple[str, str]:
    """Mean and 99th percentile of a KL divergence, which can be much smaller than 1."""
    return f"{measured.kl_mean:.4g}", f"{measured.kl_p99:.4g}"


def protocol(dataset: str, measured: Perplexity | Protocol) -> str:
    """How a perplexity was measured. Only figures with the same protocol are comparable."""
    bos = {None: "no BOS", "window": "BOS at every window", "text": "BOS at the start of the text"}[measured.bos]
    return f"{dataset}, {measured.windows} windows of {measured.seqlen} tokens, {bos}"
