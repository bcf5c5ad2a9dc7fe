"""``neuronrank tune``."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuronrank_cli import options
from neuronrank_cli.command import OUTPUT, Command
from neuronrank_cli.console import Stages, print_table, protocol, say, show, warn
from neuronrank_cli.output_file import check_output_file
from neuronrank_core import InputError, Recipe
from neuronrank_core.measures import NOISE
from neuronrank_core.methods import ALL_METHODS, decided, without_effect
from neuronrank_core.recipe import Exponents
from neuronrank_core.search_space import DEFAULT_EXPERT_METHODS, DEFAULT_METHODS, Space

if TYPE_CHECKING:
    from neuronrank_torch.runs.tune.tune_result import Trial, TuneResult

#: Lowest number of trials with the default methods: the starting points, with every allocation.
LEAST = len(Space(Recipe(), DEFAULT_METHODS, ("uniform", "neuronrank")).starts())
SEARCH, EVALUATION, TEST = "Search", "Evaluation", "Test"
EXAMPLE = """\b
Example:
  neuronrank collect --model MODEL --dataset calibration.txt --save stats/
  neuronrank tune --model MODEL --stats stats/ \\
      --eval-dataset validation.txt --save tuned.toml
  neuronrank prune --config tuned.toml --save out/
"""


@click.command(cls=Command, epilog=EXAMPLE)
@options.model_flags
@options.flag(
    "--stats",
    SEARCH,
    "Folder written by `neuronrank collect`. The signal is that of the statistics.",
    metavar="FOLDER",
    required=True,
)
@options.count_flag(
    "--trials",
    SEARCH,
    "Total number of recipes to try, including those of earlier runs.",
    default=30,
    default_text=f"30; x>={LEAST} with the default methods",
)
@options.flag(
    "--prune_method",
    SEARCH,
    "Method to try. Can be repeated.",
    into="methods",
    type=options.Name(tuple(ALL_METHODS)),
    multiple=True,
    default_text=f"{', '.join(DEFAULT_METHODS)}; {', '.join(DEFAULT_EXPERT_METHODS)} for experts",
    metavar="METHOD",
)
@options.flag(
    "--proxy",
    SEARCH,
    "Give up a recipe early if its error is more than twice that of the best recipe so far, measured after the "
    "first quarter of the layers on the first window.",
    is_flag=True,
)
@options.recipe_flags("Calibration", ("seed",), SEARCH)
@options.flag(
    "--storage",
    SEARCH,
    "SQLite file, or URL of a database, that stores the trials. Rerun the same command to resume; several "
    "processes can share it.",
    metavar="FILE",
    default_text="--save, with .db",
)
@options.recipe_flags("What to prune", ("sparsity_type", "sparsity_ratio", "pruning_last"))
@options.recipe_flags("What to prune", ("include_attention", "prune_lm_head"))
@options.text_flag("--eval-dataset", EVALUATION, "Evaluation text, not the calibration text")
@options.windows_flag("--eval-windows", EVALUATION, default=8)
@options.count_flag("--seqlen", EVALUATION, "Tokens per window.", low=2, default_text="as in the statistics")
@options.count_flag("--batch-size", EVALUATION, "Windows per forward pass.", default=1)
@options.flag(
    "--test-dataset",
    TEST,
    "Text on which the best recipe, Wanda (REAP for experts) and the default are measured once, at the end. No choice"
    " depends on it.",
    metavar="SOURCE",
)
@options.windows_flag("--test-windows", TEST)
@options.flag(
    "--save",
    OUTPUT,
    "TOML file for the best recipe, to use with `neuronrank prune --config`.",
    metavar="FILE",
    required=True,
)
@options.force_flag("an existing file")
@options.json_flag
@click.pass_context
def tune(ctx: click.Context, /, save: str, as_json: bool, **flags: Any) -> None:
    """Search for the recipe with the lowest perplexity on a text.

    For unstructured and N:M sparsity, and for removing experts. Uses statistics from `neuronrank collect`. Starts with
    Wanda (REAP for experts), the defaults of the methods, the presets and --allocate neuronrank, so the result is at
    least as good as each of them on that text. Then Optuna's TPE sampler proposes recipes. No pruned model is saved.
    """
    file = check_output_file(save, force=flags["force"], example="tuned.toml")
    if file.suffix != ".toml":
        raise InputError(f"--save {save} is not the name of a .toml file", hint="for example --save tuned.toml")
    recipe = options.recipe_of(ctx, {name: value for name, value in flags.items() if name != "seqlen"})
    if flags["test_windows"] and not flags["test_dataset"]:
        warn("--test-windows has no effect without --test-dataset")
    with Stages() as stages:
        best, result = _search(flags, recipe, file, stages)
        write_config(file, best, result)
    show(result, as_json, print_tuned)
    if not as_json:
        say(f"saved to: {save}")


def _search(flags: dict[str, Any], recipe: Recipe, file: Path, stages: Stages) -> tuple[Recipe, TuneResult]:
    """Search. Imports torch and optuna here, because --help does not need them."""
    from neuronrank_torch.runs.tune import require_optuna

    require_optuna()
    from neuronrank_torch.runs.tune.run import TuneJob, run_tune

    values = options.fields_of(TuneJob, flags) | {"storage": flags["storage"] or str(file.with_suffix(".db"))}
    return run_tune(TuneJob(**values), recipe, stages)


#: Fields that the file states even at their defaults, if they have an effect.
_STATED = {"method", "sparsity_type", "sparsity_ratio", "tfidf_mode", *(f.name for f in fields(Exponents))}
#: Fields that are fixed by the statistics.
_FIXED = {"propagate", "nsamples", "seqlen", "bos", "update"}


def config_text(best: Recipe, result: TuneResult) -> str:
    """The recipe as a section [prune], and what was measured as comments."""
    complete, settings = decided(best), {"model": result.model, "stats": result.stats}
    idle = without_effect(best, _STATED)
    for field in fields(Recipe):
        value = getattr(complete, field.name)
        if field.name in _STATED.difference(idle) or (field.name not in _STATED | _FIXED and value != field.default):
            settings[options.SPELLING[field.name].lstrip("-")] = value
    notes = [
        f"Found by neuronrank {result.versions['neuronrank']} tune: the best of {len(result.trials)} recipes.",
        f"Perplexity {result.best.perplexity:.4f} on {protocol(result.validation.dataset, result.validation)}.",
        f"There, unpruned: {result.dense:.4f}",
        *(f"There, {t.start}: {t.perplexity:.4f}{_beyond(t, result)}" for t in result.trials if t.start in ALL_METHODS),
        *_noise(result),
    ]
    if result.test:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in result.test.perplexity.items())
        notes.append(f"Perplexity on {protocol(result.test.dataset, result.test)}: {figures}")
    if "tfidf_mode" in idle:
        notes.append("nr-tfidf-mode has no effect on this recipe.")
    lines = [
        *("# " + note.replace("\n", " ") for note in notes),
        "[prune]",
        *(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()),
    ]
    return "\n".join(lines) + "\n"


def write_config(file: Path, best: Recipe, result: TuneResult) -> None:
    """Write the recipe, completely or not at all."""
    from neuronrank_torch.files.durable import write_durably

    text = config_text(best, result)
    write_durably(file, lambda path: path.write_text(text, encoding="utf-8"))


def _beyond(trial: Trial, result: TuneResult) -> str:
    """How far a trial is from the best, with the standard error."""
    if trial.standard_error is None or trial == result.best:
        return ""
    return f" (+{trial.perplexity - result.best.perplexity:.4f}, standard error {trial.standard_error:.4f})"


def _noise(result: TuneResult) -> list[str]:
    """What the windows can and cannot tell apart."""
    windows = result.validation.windows
    if windows < 2:
        return ["A single window cannot tell noise from a difference."]
    near = {
        trial.start for trial in result.trials if trial.number in result.within_noise and trial.start in ALL_METHODS
    }
    among = f", among them {', '.join(sorted(map(str, near)))}" if near else ""
    within = f"within noise of the best (at most {NOISE:g} standard errors over {windows} windows)"
    return [f"{within}: {len(result.within_noise)} of {len(result.trials) - 1} other recipes{among}"]


def print_tuned(result: TuneResult) -> None:
    """Print the best recipe next to the starting points, the importance of the settings, and the test."""
    tested = result.test.perplexity if result.test else {}
    headings = ("recipe", "trial", "perplexity", *(["on test"] if result.test else []))

    def cells(name: str, number: str, value: float, key: str) -> list[str]:
        return [name, number, f"{value:.4f}", f"{tested[key]:.4f}" if key in tested else ""][: len(headings)]

    starts = sorted((t for t in result.trials if t.start), key=lambda t: -t.perplexity)
    rows = [cells(str(t.start), str(t.number), t.perplexity, str(t.start)) for t in starts]
    print_table(
        headings,
        [cells("unpruned", "", result.dense, "dense"), *rows],
        total=cells("best", str(result.best.number), result.best.perplexity, "best"),
        left=("recipe", "trial"),
        rule=False,
    )
    where = result.validation
    say(f"measured on: {protocol(where.dataset, where)}; {len(result.trials)} recipes")
    for line in _noise(result):
        say(line)
    if result.given_up:
        say(f"given up early: {result.given_up} recipes")
    if result.test:
        say(f"test: {protocol(result.test.dataset, result.test)}")
        for name in (name for name in result.test.perplexity if name not in ("dense", "best")):
            difference, error = tested["best"] - tested[name], result.test.standard_error[name]
            known = "unknown with a single window" if error is None else f"{error:.4f}"
            noise = "; within noise" if error is not None and abs(difference) <= NOISE * error else ""
            noise = noise if difference or error else "; no difference"
            say(f"test, best compared with {name}: {difference:+.4f} (standard error {known}){noise}")
    if result.importance:
        documented = {name: str(rank) for rank, name in enumerate(result.documented_order, 1)}
        headings = ("most important settings", "importance", "documented rank")
        rows = [
            [options.SPELLING[name], f"{share:.0%}", documented.get(name, "")]
            for name, share in result.importance.items()
        ]
        print_table(headings, rows, left=headings)
