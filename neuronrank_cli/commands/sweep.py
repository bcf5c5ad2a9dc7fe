"""``neuronrank sweep``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from neuronrank_cli import options
from neuronrank_cli.command import OUTPUT, Command
from neuronrank_cli.console import Stages, decimal, print_table, protocol, say, show, warn
from neuronrank_cli.output_file import check_output_file, check_writable
from neuronrank_core import InputError
from neuronrank_core.methods import ALL_METHODS
from neuronrank_core.recipe import UPDATES, Recipe, parse_pattern

if TYPE_CHECKING:
    from pathlib import Path

    from neuronrank_torch.runs.sweep_result import Cell, SweepResult

CELLS, CALIBRATION, EVALUATION = "What to sweep", "Calibration", "Evaluation"
RATIOS = (0.3, 0.5, 0.6, 0.7)
EXAMPLE = """\b
Example:
  neuronrank sweep --model MODEL --sparsity_ratio 0.5 --sparsity_ratio 0.6 \\
      --prune_method wanda --prune_method neuronrank_wanda --out cells.jsonl
"""


@click.command(cls=Command, epilog=EXAMPLE)
@options.model_flags
@options.flag(
    "--sparsity_ratio",
    CELLS,
    "Fraction of weights to zero, or of neurons to remove. Can be repeated.",
    into="ratios",
    type=float,
    multiple=True,
    metavar="FLOAT",
    default_text=", ".join(map(str, RATIOS)) + "; N/M with N:M",
)
@options.flag(
    "--prune_method",
    CELLS,
    "Scoring method. Can be repeated.",
    into="methods",
    type=options.Name(tuple(ALL_METHODS)),
    multiple=True,
    default_text=f"wanda, {Recipe.method}; the latter alone, with neurons, heads, experts or layers",
    metavar="METHOD",
)
@options.flag(
    "--update",
    CELLS,
    "Update of the remaining weights. Can be repeated.",
    into="updates",
    type=options.Name(UPDATES),
    multiple=True,
    default=("none",),
)
@options.recipe_flags(
    "What to prune", ("sparsity_type", "allocate", "pruning_last", "include_attention", "prune_lm_head"), CELLS
)
@options.text_flag("--dataset", CALIBRATION, "Calibration text")
@options.flag("--stats", CALIBRATION, "Folder written by `neuronrank collect`, instead of a text.", metavar="FOLDER")
@options.recipe_flags("Calibration", ("nsamples", "seqlen", "bos", "propagate", "seed"))
@options.count_flag("--batch-size", CALIBRATION, "Sequences per micro-batch.", default_text="about 2048 tokens")
@options.text_flag("--eval-dataset", EVALUATION, "Evaluation text, not the calibration text")
@options.windows_flag("--eval-windows", EVALUATION, default=8)
@options.flag(
    "--out",
    OUTPUT,
    "File for the results, a line of JSON for each. Rerun the same command to resume; more ratios, methods or updates "
    "extend it.",
    metavar="FILE",
    required=True,
)
@options.flag(
    "--figure",
    OUTPUT,
    "SVG file for a figure of perplexity against the share of weights. Requires matplotlib.",
    metavar="FILE",
)
@options.flag("--force", OUTPUT, "Replace the figure, and discard the results of a different sweep.", is_flag=True)
@options.json_flag
@click.pass_context
def sweep(ctx: click.Context, /, as_json: bool, figure: str | None, **flags: Any) -> None:
    """Measure perplexity at every ratio, with every method and update.

    Each combination prunes a copy of the model in memory, by statistics or on the calibration text. No pruned model is
    saved.
    """
    recipe = options.recipe_of(ctx, flags)
    flags["methods"] = flags["methods"] or default_methods(recipe)
    if flags["stats"]:
        options.warn_of_idle(ctx, dict.fromkeys(("dataset", "nsamples", "propagate"), "with --stats"))
    pattern = parse_pattern(recipe.sparsity_type)
    flags["ratios"] = flags["ratios"] or ((pattern[0] / pattern[1],) if pattern else RATIOS)
    check_writable(flags["out"])
    drawn = check_output_file(figure, force=flags["force"], example="sweep.svg") if figure else None
    if drawn and drawn.suffix != ".svg":
        raise InputError(f"--figure {figure} is not the name of an .svg file", hint="for example --figure sweep.svg")
    if drawn and find_spec("matplotlib") is None:
        warn("no figure is drawn without matplotlib: pip install matplotlib, then rerun the same command")
        drawn = None
    with Stages() as stages:
        from neuronrank_torch.runs.job import Evaluation
        from neuronrank_torch.runs.sweep import SweepJob, run_sweep

        evaluation = Evaluation(flags["eval_dataset"], recipe.seqlen, flags["eval_windows"], recipe.bos)
        result = run_sweep(SweepJob(**options.fields_of(SweepJob, flags), evaluation=evaluation), recipe, stages)
        if drawn:
            draw(result, drawn)
    show(result, as_json, print_sweep)
    if drawn and not as_json:
        say(f"figure: {figure}")


def default_methods(recipe: Recipe) -> tuple[str, ...]:
    """Wanda and the main method, as far as they can choose what the recipe removes."""
    if recipe.structured:
        return (Recipe.method,)
    return ("wanda", Recipe.method)


def _rows(result: SweepResult) -> dict[tuple[str, str], list[Cell]]:
    """The cells of each method and update, by ratio."""
    rows: dict[tuple[str, str], list[Cell]] = {}
    for cell in sorted(result.cells, key=lambda cell: cell.ratio):
        rows.setdefault((cell.method, cell.update), []).append(cell)
    return rows


def print_sweep(result: SweepResult) -> None:
    """Print a row for each method and update, with a perplexity for each ratio."""
    rows = _rows(result)
    ratios = [f"{cell.ratio:g}" for cell in next(iter(rows.values()))]
    values = [
        [*key, *("failed" if cell.perplexity is None else decimal(cell.perplexity) for cell in cells)]
        for key, cells in rows.items()
    ]
    print_table(("method", "update", *ratios), values, left=("method", "update"))
    say(f"perplexity by ratio, {result.sparsity_type}; unpruned: {decimal(result.dense.perplexity)}")
    say(f"measured on: {protocol(result.evaluated_on, result.dense)}")
    say(f"results: {result.out}")


def draw(result: SweepResult, file: Path) -> None:
    """Draw perplexity against the share of weights that is zero or removed, as SVG."""
    from matplotlib.figure import Figure

    from neuronrank_torch.files.durable import write_durably

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (method, update), cells in _rows(result).items():
        known = [(100 * c.share, c.perplexity) for c in cells if c.share is not None and c.perplexity is not None]
        label = method if update == "none" else f"{method}, {update}"
        axes.plot([share for share, _ in known], [value for _, value in known], marker="o", label=label)
    axes.axhline(result.dense.perplexity, color="gray", linestyle="dashed", label="unpruned")
    axes.set_yscale("log")
    axes.set_xlabel("share of the prunable weights that is zero or removed, %")
    axes.set_ylabel("perplexity (log scale)")
    axes.legend()
    write_durably(file, lambda path: figure.savefig(path, format="svg"))
