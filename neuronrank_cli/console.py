"""What a user sees while a run goes on (stderr) and when it ends (stdout)."""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import ExitStack, redirect_stdout
from types import TracebackType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

#: Seconds between two lines about the same activity, where progress is printed as lines.
LINE_SECONDS = 10.0


class _TimeLeft(TimeRemainingColumn):
    """The estimated time left, with a word that tells it from the time elapsed."""

    def render(self, task: Task) -> Text:
        shown = super().render(task)
        return Text(f"{shown} left") if task.total and task.time_remaining is not None else Text("")


class Stages:
    """Shows progress on stderr: a bar on a terminal, plain lines elsewhere. Call it like any ``progress``.

    Plain lines are for log files: one when something else begins, then at most one every :data:`LINE_SECONDS`. While
    it is open, output of libraries goes to stderr too, because stdout is for the result.
    """

    def __init__(self) -> None:
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
        self.open = ExitStack()

    def __enter__(self) -> Stages:
        self.open.enter_context(redirect_stdout(sys.stderr))
        self.open.enter_context(self.bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open.close()

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


def warn(message: str) -> None:
    """Say something on stderr that the user should know."""
    click.echo(f"Warning: {message}", err=True)


def print_json(value: Any) -> None:
    """Print a value on stdout, alone."""
    click.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def print_report(report: dict[str, Any]) -> None:
    """Print the table of a finished or planned run, and what it comes to."""
    job, recipe, total = report["job"], report["recipe"], report["total"]
    planned = job.get("dry_run", False)
    goal = f"{recipe['sparsity_ratio']:.4g} {recipe['sparsity_type']}"
    click.echo(f"{job['model']}: {recipe['method']}, {goal}{', planned' if planned else ''}")
    Console().print(_table(report, times=not planned))
    if total["removed"]:
        verb = "to remove" if planned else "removed"
        click.echo(f"parameters {verb}: {total['removed']:,}; the whole model has {total['parameters']:,}")
    else:
        verb = "to zero" if planned else "zeroed"
        click.echo(f"parameters {verb}: {total['zeros']:,} of {total['parameters']:,} in the whole model")
    if "perplexity" in report:
        before, after = report["perplexity"]["before"], report["perplexity"]["after"]
        click.echo(f"perplexity before: {before['perplexity']:.4f}")
        click.echo(f"perplexity after:  {after['perplexity']:.4f}")
        click.echo(f"measured on: {protocol(job['evaluation']['dataset'], after)}")
    if planned:
        if report["calibration"]:
            text = report["calibration"].get("dataset", job["dataset"])
            click.echo(f"calibration: {recipe['nsamples']} sequences of {recipe['seqlen']} tokens of {text}")
        for line in _estimates(report["plan"]):
            click.echo(line)
        click.echo("dry run: nothing was calibrated, pruned or saved")
    elif job["save"]:
        click.echo(f"saved to: {job['save']}")


def _estimates(plan: dict[str, Any]) -> list[str]:
    """What a planned run will cost, in lines."""
    parts = {name: size for name, size in plan["memory"].items() if size}
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    minutes = plan["seconds"] / 60
    duration = f"{minutes:.0f} min" if minutes >= 2 else f"{plan['seconds']:.0f} s"
    return [
        f"a layer: {size_text(plan['layer_bytes'])}",
        f"peak memory: about {size_text(sum(parts.values()))}: {listed}",
        f"time: about {duration}, by what the first layer took here",
    ]


def size_text(size: int) -> str:
    """A number of bytes for people."""
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def _table(report: dict[str, Any], *, times: bool) -> Table:
    """Sparsity per layer and in all, with the seconds that each took where there are any."""
    table = Table()
    gone = "removed" if report["total"]["removed"] else "zeros"
    for heading in ("layer", "weights", gone, "sparsity", *(["seconds"] if times else [])):
        table.add_column(heading, justify="right")

    def cells(name: str, size: int, zeros: int, seconds: float) -> list[str]:
        share = zeros / size if size else 0.0
        return [name, f"{size:,}", f"{zeros:,}", f"{share:.4%}", *([f"{seconds:.1f}"] if times else [])]

    for layer in report["layers"]:
        modules = layer["modules"].values()
        size, lost = sum(module["size"] for module in modules), sum(module[gone] for module in modules)
        table.add_row(*cells(str(layer["layer"]), size, lost, layer["seconds"]))
    table.add_section()
    total = report["total"]
    table.add_row(*cells("total", total["prunable"], total[gone], report["seconds"]), style="bold")
    return table


def protocol(dataset: str, perplexity: dict[str, Any]) -> str:
    """What a perplexity was measured on, without which it means nothing."""
    bos = {None: "no BOS", "window": "BOS at every window", "text": "BOS at the start of the text"}[perplexity["bos"]]
    return f"{dataset}, {perplexity['windows']} windows of {perplexity['seqlen']} tokens, {bos}"
