"""``neuronrank tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuronrank_cli.command import OUTPUT, Command, Flag
from neuronrank_cli.console import Stages, print_json, warn
from neuronrank_cli.options import (
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
from neuronrank_cli.tuned import check_file, print_tuned, write_config
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
    from neuronrank_torch.tuning import require_optuna

    require_optuna()
    from neuronrank_torch.tuning.run import TuneJob, run_tune

    values = {name: value for name, value in flags.items() if name in TuneJob.__dataclass_fields__}
    return run_tune(TuneJob(**{**values, "storage": flags["storage"] or str(file.with_suffix(".db"))}), recipe, stages)
