"""What ``neuronrank tune`` found: a file for ``prune --config``, and tables on stdout."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from neuronrank_cli.console import protocol
from neuronrank_cli.options import SPELLING
from neuronrank_core import InputError, Recipe

#: Fields that the statistics decide.
_DECIDED = {"propagate", "nsamples", "seqlen", "bos", "update"}


def check_file(save: str, *, force: bool) -> Path:
    """The file to write; refuses to replace one without ``force``, and a place that cannot be written to."""
    file = Path(save).expanduser()
    if file.is_dir() or file.suffix != ".toml":
        raise InputError(f"--save {save} is not the name of a .toml file")
    if file.exists() and not force:
        raise InputError(f"{save} already exists", hint="name another file, or replace it with --force")
    if not file.parent.is_dir():
        raise InputError(f"there is no folder {file.parent} to save {file.name} in")
    return file


def config_text(best: Recipe, result: dict[str, Any]) -> str:
    """The recipe as a section [prune]: flags other than the defaults, with what it reached on what."""
    best_value, where = result["best"]["perplexity"], result["validation"]
    compared = f"dense {result['dense']:.4f}" + "".join(
        f", {one['start']} {one['perplexity']:.4f}" for one in result["trials"] if one["start"] == "wanda"
    )
    settings: dict[str, Any] = {"model": result["model"], "stats": result["stats"]}
    for field in fields(Recipe):
        value = getattr(best, field.name)
        if field.name not in _DECIDED and value != field.default:
            settings[SPELLING[field.name].lstrip("-")] = value
    lines = [
        f"# Found by neuronrank {result['versions']['neuronrank']} tune: the best of {len(result['trials'])} recipes.",
        f"# Perplexity {best_value:.4f} ({compared})",
        f"# on {protocol(where['dataset'], where)}.".replace("\n", " "),
        "[prune]",
        *(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()),
    ]
    return "\n".join(lines) + "\n"


def write_config(file: Path, best: Recipe, result: dict[str, Any]) -> None:
    """Write the recipe as a whole or not at all."""
    from neuronrank_torch.checkpoint import write_durably

    text = config_text(best, result)
    write_durably(file, lambda path: path.write_text(text, encoding="utf-8"))


def print_tuned(result: dict[str, Any]) -> None:
    """Print the best recipe beside those that the search started from, what mattered, and the test."""
    console = Console()
    table = Table("recipe", "trial")
    table.add_column("perplexity", justify="right")
    test = result["test"]
    figures = test["perplexity"] if test else {}
    if test:
        table.add_column("on test", justify="right")

    def row(name: str, number: str, value: float, key: str, style: str | None = None) -> None:
        shown = [f"{figures[key]:.4f}" if key in figures else ""] if test else []
        table.add_row(name, number, f"{value:.4f}", *shown, style=style)

    best = result["best"]
    row("dense", "", result["dense"], "dense")
    for one in sorted((t for t in result["trials"] if t["start"]), key=lambda t: -t["perplexity"]):
        row(one["start"], str(one["number"]), one["perplexity"], one["start"])
    row("best", str(best["number"]), best["perplexity"], "best", style="bold")
    console.print(table)
    where = result["validation"]
    click.echo(f"measured on: {protocol(where['dataset'], where)}; {len(result['trials'])} recipes")
    if result["given_up"]:
        click.echo(f"given up early: {result['given_up']}")
    if test:
        click.echo(f"test: {protocol(test['dataset'], test)}")
    _print_importance(console, result)


def _print_importance(console: Console, result: dict[str, Any]) -> None:
    """Print what mattered most here beside the documented order."""
    if not result["importance"]:
        return
    documented = result["documented_order"]
    table = Table("what tells the best quarter", "share", "documented place")
    for name, share in result["importance"].items():
        place = str(documented.index(name) + 1) if name in documented else ""
        table.add_row(SPELLING[name], f"{share:.0%}", place)
    console.print(table)
