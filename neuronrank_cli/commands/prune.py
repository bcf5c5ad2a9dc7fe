"""``neuronrank prune``."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from neuronrank_cli import options
from neuronrank_cli.command import OUTPUT, Command
from neuronrank_cli.command_line import command_line
from neuronrank_cli.console import Stages, say, show, warn
from neuronrank_cli.prune_output import print_result
from neuronrank_cli.target import target_flags, target_of
from neuronrank_core.effort import EFFORTS, VARIANTS, candidates, passes_by_effort
from neuronrank_core.errors import InputError
from neuronrank_core.methods import ALL_METHODS, exponents, mode, needs_text, requires, without_effect
from neuronrank_core.mixes import Target
from neuronrank_core.recipe import PRESETS, Recipe
from neuronrank_core.statistics.table import SAMPLE
from neuronrank_torch.distributed import launcher

if TYPE_CHECKING:
    from neuronrank_torch.runs.prune_result import PruneResult

EXPONENTS, CALIBRATION, PERPLEXITY = "Exponents of the score", "Calibration", "Perplexity and samples"
EXAMPLE = """\b
Example:
  neuronrank prune --model builtin:smollm2-135m --nsamples 32 \\
      --eval --eval-windows 24 --save out/
"""
TABLES = {
    "Methods (a, b, c, r: the exponents of weight, TF, IDF, spikiness)": [
        (method.name, method.summary) for method in ALL_METHODS.values()
    ],
    "Effort": [
        ("fast", "no update"),
        ("good", "--update gradual (with neurons, heads or layers: least-squares; with experts: none)"),
        ("best", f"the first of good, {', '.join(VARIANTS)} that is not clearly above the best on held-out text"),
    ],
    "Presets": [
        (name, " ".join(f"{options.SPELLING[field]} {value:g}" for field, value in values.items()))
        for name, values in PRESETS.items()
    ],
}


@click.command(cls=Command, tables=TABLES, epilog=EXAMPLE)
@options.model_flags
@options.recipe_flags("What to prune")
@target_flags("What to prune")
@options.flag(
    "--preset",
    EXPONENTS,
    "Preset exponents, see Presets below. Explicit flags take precedence.",
    metavar="PRESET",
    type=click.Choice(tuple(PRESETS)),
)
@options.recipe_flags(EXPONENTS)
@options.recipe_flags("TF and IDF")
@options.recipe_flags("Factor of neuronrank_unstructured")
@options.flag(
    "--effort",
    CALIBRATION,
    "Chooses --update and --allocate: fast has no update, good re-fits the remaining weights, best compares several"
    " recipes on held-out calibration text (see Effort below). Explicit flags take precedence.",
    type=click.Choice(EFFORTS),
    default_text="the defaults of those flags",
)
@options.calibration_flag(CALIBRATION)
@options.flag(
    "--stats",
    CALIBRATION,
    "Folder written by `neuronrank collect`; prune with these statistics instead of a text.",
    metavar="FOLDER",
)
@options.recipe_flags(CALIBRATION)
@options.count_flag("--batch-size", CALIBRATION, "Sequences per micro-batch.", default_text="about 2048 tokens")
@options.eval_flag(PERPLEXITY, "Measure perplexity before and after pruning.")
@options.text_flag("--eval-dataset", PERPLEXITY, "Evaluation text")
@options.windows_flag("--eval-windows", PERPLEXITY)
@options.flag(
    "--sample",
    PERPLEXITY,
    "Continue three prompts with the model before and after pruning. Loads both whole, one after the other.",
    is_flag=True,
)
@options.flag(
    "--save", OUTPUT, "Output folder: a Hugging Face model, with the result in neuronrank.json.", metavar="FOLDER"
)
@options.force_flag("an existing model with all its files")
@options.hidden_states_flag
@options.flag(
    "--dry-run",
    OUTPUT,
    "Check all inputs and show what would be pruned, with estimates of memory and time.",
    is_flag=True,
)
@options.flag(
    "--push-to-hub",
    OUTPUT,
    "Upload the saved model to this repository of the Hugging Face hub; a new one is private.",
    metavar="REPO",
)
@options.flag("--verbose", OUTPUT, "List the sparsity of every layer.", is_flag=True)
@options.json_flag
@click.pass_context
def prune(ctx: click.Context, /, **flags: Any) -> None:
    """Prune a model and save it as a Hugging Face folder.

    With --save, layers are loaded, pruned and saved one at a time, so only one layer is in memory, except to remove
    layers or to reach a target. If interrupted, rerun the same command to resume.
    """
    target = target_of(ctx, flags)
    recipe = options.recipe_of(ctx, flags)
    given = options.given(ctx, flags)
    compared = candidates(recipe, given) if flags["effort"] == "best" else {}
    _warn_of_idle(ctx, recipe, flags, compares=target is not None or len(compared) > 1)
    if flags["effort"] in ("good", "best") and flags["stats"]:
        raise click.UsageError(
            f"--effort {flags['effort']} needs a calibration text: leave out --stats, or use --effort fast", ctx
        )
    if not (flags["save"] or flags["evaluate"] or flags["sample"] or flags["dry_run"]):
        raise click.UsageError("nothing to do with the result: give --save, --eval, --sample or --dry-run", ctx)

    if flags["push_to_hub"] and not flags["save"]:
        raise click.UsageError("--push-to-hub needs --save", ctx)
    if not (flags["save"] or flags["dry_run"]):
        warn("without --save, the pruned model is measured and not saved")

    with Stages() as stages:
        try:
            result = _run(recipe, target, compared, given, flags, stages, command_line(ctx))
        except InputError as error:
            raise _by_effort(error, given, flags["effort"]) from error.__cause__
    if not without_effect(recipe, ["signal"]):
        options.warn_of_signal(ctx, recipe.signal, result.recipe.signal)
    show(result, flags["as_json"], partial(print_result, verbose=flags["verbose"]), stages.noted)
    if flags["push_to_hub"] and not flags["dry_run"] and launcher.first():
        from neuronrank_torch.hub import push_folder

        say(f"pushed to: {push_folder(flags['save'], flags['push_to_hub'])}", err=flags["as_json"])


def _run(
    recipe: Recipe,
    target: Target | None,
    compared: dict[str, Recipe],
    given: Collection[str],
    flags: dict[str, Any],
    stages: Stages,
    command: str,
) -> PruneResult:
    """Prune or plan. Imports torch here, because --help does not need it."""
    from neuronrank_torch.hub import check_repository
    from neuronrank_torch.runs.choice import check_comparison
    from neuronrank_torch.runs.dry_run import plan_prune
    from neuronrank_torch.runs.job import Evaluation, Job
    from neuronrank_torch.runs.plan_smaller import plan_smaller
    from neuronrank_torch.runs.prune import run_prune

    if flags["push_to_hub"]:
        check_repository(flags["push_to_hub"])
    evaluation = Evaluation(flags["eval_dataset"], recipe.seqlen, flags["eval_windows"], recipe.bos)
    job = Job(**options.fields_of(Job, flags), evaluation=evaluation if flags["evaluate"] else None)
    if flags["dry_run"] and target is not None:
        return plan_smaller(job, recipe, target)
    if flags["dry_run"]:
        timed = flags["effort"] and not flags["stats"]
        efforts = passes_by_effort(recipe, given) if timed else {}
        check = partial(check_comparison, recipe) if len(compared) > 1 else None
        result = plan_prune(job, recipe, efforts, compared=check)
        if result.plan and timed:
            result = replace(result, plan=replace(result.plan, seconds=result.plan.efforts[flags["effort"]]))
        return result
    if len(compared) == 1:
        warn("--effort best is the same as good here: no other recipe applies to these settings")
    return run_prune(job, recipe, stages, compared if len(compared) > 1 else {}, stages.note, command, target)


def _by_effort(error: InputError, given: Collection[str], effort: str | None) -> InputError:
    """An error that names the flag the user set, if it is about a setting that an effort level stands for."""
    setting = re.match(r"--(update|allocate) \S+ (?=cannot|needs)", str(error))
    if not effort or setting is None or setting[1] in given:
        return error
    reworded = f"--effort {effort} {str(error)[setting.end() :]}"
    return InputError(reworded, hint=error.hint)


def _warn_of_idle(ctx: click.Context, recipe: Recipe, flags: dict[str, Any], *, compares: bool) -> None:
    """Warn of the flags that the user set and that have no effect on this run, with the reason.

    A run that ``compares`` recipes reads the calibration text for that alone.
    """
    sized = flags["target_params"] is not None or flags["max_loss"] is not None
    for name in without_effect(recipe, options.given(ctx, flags).keys() - ({"divisible_by"} if sized else set())):
        warn(f"{options.SPELLING[name]} has no effect on {_ignoring(recipe, name)}")
    preset = PRESETS.get(flags["preset"], {})
    if preset and len(without_effect(recipe, preset)) == len(preset):
        warn(f"--preset has no effect on {recipe.method}")
    idle = {} if compares else _without_text(recipe, flags)
    if flags["effort"] in ("fast", "good") and "update" in options.given(ctx, flags):
        idle["effort"] = "with --update"
    if not flags["evaluate"]:
        idle |= dict.fromkeys(("eval_dataset", "eval_windows"), "without --eval")
    if flags["as_json"]:
        idle["verbose"] = "with --json"
    if not flags["save"]:
        idle |= dict.fromkeys(("force", "hidden_states"), "without --save")
    elif sized or recipe.removes_layers:
        idle["hidden_states"] = "where the whole model is in memory"
    if flags["dry_run"]:
        idle |= dict.fromkeys(("push_to_hub", "sample"), "with --dry-run")
    options.warn_of_idle(ctx, dict(sorted(idle.items())))


def _without_text(recipe: Recipe, flags: dict[str, Any]) -> dict[str, str]:
    """Flags that have an effect only on calibration text, with the reason why this run does not use any."""
    unread = {"dataset", "nsamples", "propagate", "hidden_states"}
    if not flags["evaluate"]:
        unread |= {"seqlen", "bos", "batch_size"}
    if mode(recipe) != "topic" or SAMPLE not in requires(recipe):  # Topics depend on random numbers.
        unread |= {"seed"} - ALL_METHODS[recipe.method].reads
    if not needs_text(recipe):
        return dict.fromkeys(unread | {"stats"}, f"on {recipe.method}, which needs no text")
    return dict.fromkeys(unread, "with --stats") if flags["stats"] else {}


def _ignoring(recipe: Recipe, name: str) -> str:
    """The part of a recipe that ignores a field: its sparsity type, its method, or the method in its mode."""
    if name in ("compare", "multiple_of", "divisible_by") or recipe.removes_layers:
        return recipe.sparsity_type
    if name in ("update_iterations", "update_target"):
        return recipe.sparsity_type if recipe.structured else "a run without --update"
    if name not in ALL_METHODS[recipe.method].reads:
        return recipe.method
    if recipe.removes_experts and name in ("tfidf_mode", "signal"):  # Both are fixed.
        return f"the experts of {recipe.method}: use --prune_method neuronrank_tfidf"
    if name == "tfidf_mode":  # Nothing else reads the groups: IDF is off, and TF, if on, is not that of the signal.
        return f"{recipe.method} without IDF: set --idf-exp 0.5 too, or use --prune_method neuronrank_tfidf"
    off = " with --idf-exp 0" if exponents(recipe).idf_exp == 0 else ""
    return f"{recipe.method} in {mode(recipe)} mode{off}"
