"""``neuronrank tune``."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from neuronrank_cli.command import OUTPUT, Command, Flag
from neuronrank_cli.console import Stages, print_json, protocol, warn
from neuronrank_cli.options import (
    SPELLING,
    Name,
    count_flag,
    force_flag,
    json_flag,
    model_flags,
    recipe_flags,
    recipe_of,
    text_flag,
    windows_flag,
)
from neuronrank_core import InputError, Recipe
from neuronrank_core.methods import METHODS
from neuronrank_core.search_space import DEFAULT_METHODS

SEARCH, COMPARED, TEST = "Search", "What recipes are compared on", "Test"
EXAMPLE = """\b
Example:
  neuronrank collect --model MODEL --dataset calibration.txt --nsamples 32 --save stats/
  neuronrank tune --model MODEL --stats stats/ --eval-dataset validation.txt --save tuned.toml
  neuronrank prune --config tuned.toml --save out/
"""


@click.command(cls=Command, epilog=EXAMPLE)
@model_flags
@click.option(
    "--stats",
    cls=Flag,
    section=SEARCH,
    metavar="FOLDER",
    required=True,
    help="Statistics that `neuronrank collect` saved. The signal is theirs.",
)
@count_flag("--trials", SEARCH, "Recipes to try in all, with those of earlier runs.", default=30)
@click.option(
    "--prune_method",
    "methods",
    cls=Flag,
    section=SEARCH,
    type=Name(tuple(METHODS)),
    multiple=True,
    default=DEFAULT_METHODS,
    metavar="METHOD",
    help="A method to try; give it several times for several.",
)
@click.option(
    "--proxy",
    cls=Flag,
    section=SEARCH,
    is_flag=True,
    help="Give up a recipe where the output of the first quarter of the layers on the first window errs twice as much "
    "as with the best recipe so far.",
)
@recipe_flags("Calibration", ("seed",), SEARCH)
@click.option(
    "--storage",
    cls=Flag,
    section=SEARCH,
    metavar="FILE",
    default_text="--save, with .db",
    help="SQLite file (or URL of a database) that keeps the trials: the same command goes on from there, and several "
    "can work at once.",
)
@recipe_flags("What to prune", ("sparsity_type", "sparsity_ratio", "pruning_last"))
@recipe_flags("What to prune", ("include_attention", "prune_lm_head"))
@text_flag("--eval-dataset", COMPARED, "Text other than the calibration text")
@windows_flag("--eval-windows", COMPARED, default=8)
@count_flag("--seqlen", COMPARED, "Tokens in a window.", low=2, default_text="that of the statistics")
@count_flag("--batch-size", COMPARED, "Windows in a forward pass.", default=1)
@click.option(
    "--test-dataset",
    cls=Flag,
    section=TEST,
    metavar="SOURCE",
    help="Text to measure the result on once, in the end, beside Wanda and the default; no choice depends on it.",
)
@windows_flag("--test-windows", TEST)
@click.option(
    "--save",
    cls=Flag,
    section=OUTPUT,
    metavar="FILE",
    required=True,
    help="Where to write the best recipe: a TOML file for `neuronrank prune --config`.",
)
@force_flag("the file")
@json_flag
@click.pass_context
def tune(ctx: click.Context, /, save: str, as_json: bool, **flags: Any) -> None:
    """Search for the recipe with the lowest perplexity on a text, by statistics that were collected once.

    Wanda, the methods' defaults, the presets and --allocate neuronrank are tried first, so that the result is no worse
    than any of them on that text; then Optuna's TPE proposes. Masks are made in memory; nothing else is saved.
    """
    file = check_file(save, force=flags["force"])
    recipe = recipe_of(ctx, {name: value for name, value in flags.items() if name != "seqlen"})
    if flags["test_windows"] and not flags["test_dataset"]:
        warn("--test-windows has no effect without --test-dataset")
    with Stages() as stages:
        best, result = _search(flags, recipe, file, stages)
        write_config(file, best, result)
    for note in result["notes"]:
        warn(note)
    if as_json:
        print_json(result)
    else:
        print_tuned(result)
        click.echo(f"saved to: {save}")


def _search(flags: dict[str, Any], recipe: Any, file: Path, stages: Stages) -> tuple[Any, dict[str, Any]]:
    """Do it; torch and optuna are imported here, where a run needs them."""
    from neuronrank_torch.runs.tune import require_optuna

    require_optuna()
    from neuronrank_torch.runs.tune.run import TuneJob, run_tune

    values = {name: value for name, value in flags.items() if name in TuneJob.__dataclass_fields__}
    return run_tune(TuneJob(**{**values, "storage": flags["storage"] or str(file.with_suffix(".db"))}), recipe, stages)


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
    from neuronrank_torch.files.durable import write_durably

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
