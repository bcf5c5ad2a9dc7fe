"""What a user sees while a run goes on (stderr) and when it ends (stdout)."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Stages:
    """Progress on stderr: a bar on a terminal, a line a stage elsewhere. Call it with (stage, done, total)."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=None)
        self.stage = ""

    def __enter__(self) -> Stages:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show where the run is."""
        if stage != self.stage:
            self.stage = stage
            if not self.console.is_terminal:
                click.echo(f"{stage} ({done}/{total})" if total > 1 else stage, err=True)
        self.bar.update(self.task, description=stage, completed=done, total=total)


def warn(message: str) -> None:
    """Say something on stderr that the user should know."""
    click.echo(f"Warning: {message}", err=True)


def print_json(value: Any) -> None:
    """Print a value on stdout, alone."""
    click.echo(json.dumps(value, indent=2, sort_keys=True))


def print_report(report: dict[str, Any]) -> None:
    """Print the table of a finished run."""
    planned = " (planned, nothing done)" if report["job"].get("dry_run") else ""
    title = f"{report['job']['model']}, {report['recipe']['method']}{planned}"
    table = Table(title=title, title_justify="left")
    for heading in ("layer", "weights", "zeros", "sparsity", "seconds"):
        table.add_column(heading, justify="right")
    for layer in report["layers"]:
        size = sum(module["size"] for module in layer["modules"].values())
        zeros = sum(module["zeros"] for module in layer["modules"].values())
        table.add_row(str(layer["layer"]), f"{size:,}", f"{zeros:,}", f"{zeros / size:.4%}", f"{layer['seconds']:.1f}")
    total = report["total"]
    table.add_section()
    share = total["zeros"] / total["prunable"] if total["prunable"] else 0.0
    row = ("total", f"{total['prunable']:,}", f"{total['zeros']:,}", f"{share:.4%}", f"{report['seconds']:.1f}")
    table.add_row(*row, style="bold")
    Console().print(table)
    if planned:
        return
    click.echo(f"parameters zeroed: {total['zeros']:,} of {total['parameters']:,} in the whole model")
    if "perplexity" in report:
        before, after = report["perplexity"]["before"], report["perplexity"]["after"]
        click.echo(f"perplexity before: {before['perplexity']:.2f}")
        click.echo(f"perplexity after:  {after['perplexity']:.2f}")
        click.echo(f"measured on: {protocol(report['job']['evaluation']['dataset'], after)}")
    if report["job"]["save"]:
        click.echo(f"saved to: {report['job']['save']}")


def protocol(dataset: str, perplexity: dict[str, Any]) -> str:
    """What a perplexity was measured on, without which it means nothing."""
    bos = {None: "no BOS", "window": "BOS at every window", "text": "BOS at the start of the text"}[perplexity["bos"]]
    return f"{dataset}, {perplexity['windows']} windows of {perplexity['seqlen']} tokens, {bos}"
