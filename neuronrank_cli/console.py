"""What a user sees while a run goes on (stderr) and when it ends (stdout)."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, redirect_stdout
from types import TracebackType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Stages:
    """Progress on stderr: a bar on a terminal, a line a stage elsewhere. Call it with (stage, done, total).

    While it is open, whatever a library prints goes to stderr too: stdout is for the result.
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.live = console.is_terminal and not console.is_dumb_terminal
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self.live,
        )
        self.task = self.bar.add_task("starting", total=None)
        self.stage = ""
        self.open = ExitStack()

    def __enter__(self) -> Stages:
        self.open.enter_context(redirect_stdout(sys.stderr))
        self.open.enter_context(self.bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show where the run is."""
        if stage != self.stage:
            self.stage = stage
            if not self.live:
                click.echo(f"{stage} ({done}/{total})" if total > 1 else stage, err=True)
        self.bar.update(self.task, description=stage, completed=done, total=total)


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
