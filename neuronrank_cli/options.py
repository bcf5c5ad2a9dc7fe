"""Flags: those of a recipe, declared once as a table, and those that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any

import click
from click.core import ParameterSource

from neuronrank_cli.command import OUTPUT, Flag
from neuronrank_core.methods import METHODS, check_recipe
from neuronrank_core.recipe import COMPARE, MODES, SIGNALS, UPDATES, Exponents, Recipe

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


class Name(click.Choice[str]):
    """A choice among names in which dashes and underscores are interchangeable too, shown with underscores."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        """Compare names with underscores."""
        del ctx
        return str(choice).replace("-", "_")


@dataclass(frozen=True)
class RecipeFlag:
    """A flag that sets one field of a :class:`Recipe`."""

    field: str
    flag: str
    kind: Any
    help: str
    default_text: str = ""
    metavar: str | None = None


def _exponent_default(name: str) -> str:
    """The exponent's default, and the methods that have another."""
    common = getattr(Exponents(), name)
    own = {m.name: m.defaults[name] for m in METHODS.values() if m.defaults.get(name, common) != common}
    return "; ".join([f"{common:g}", *(f"{value:g} for {method}" for method, value in own.items())])


def _exponent(field: str, flag: str, text: str) -> RecipeFlag:
    return RecipeFlag(field, flag, float, text, _exponent_default(field))


BOS = ("window", "text")
SPARSITY_HELP = "unstructured; N:M such as 2:4: N of every M go; or neurons: whole ones are removed for good."
BOS_HELP = "Where a beginning-of-sequence token stands, for tokenizers that add one."

#: Flags by section of the help.
RECIPE_FLAGS = {
    "What to prune": (
        RecipeFlag(
            "method", "--prune_method", Name(tuple(METHODS)), "How weights are scored: see below.", "", "METHOD"
        ),
        RecipeFlag("sparsity_type", "--sparsity_type", str, SPARSITY_HELP),
        RecipeFlag(
            "sparsity_ratio",
            "--sparsity_ratio",
            float,
            "Share of weights to zero, or of neurons to remove.",
            "0.5, or N/M",
        ),
        RecipeFlag(
            "allocate",
            "--allocate",
            Name(("uniform", "neuronrank")),
            "Ratio of each layer: the same, or more where pruning costs least (one pass more).",
        ),
        RecipeFlag("pruning_last", "--pruning_last", int, "Prune the last N layers only.", "all layers"),
        RecipeFlag("compare", "--compare", Name(COMPARE), "Within what weights compete.", "the method's"),
        RecipeFlag(
            "include_attention",
            "--nr-include-attention/--nr-skip-attention",
            bool,
            "Prune q/k/v/o too, with Wanda's score.",
            "skip",
        ),
        RecipeFlag("prune_lm_head", "--nr-prune-lm-head", bool, "Prune the head too, where it is not tied."),
    ),
    "Exponents of the score": (
        _exponent("weight_exp", "--weight-exp", "Of the weight's magnitude."),
        _exponent("input_exp", "--input-exp", "Of the input's norm."),
        _exponent("tf_exp", "--tf-exp", "Of TF, how strongly the neuron fires."),
        _exponent("idf_exp", "--idf-exp", "Of IDF, how selectively it fires."),
        _exponent("spikiness_exp", "--nr-spikiness-exp", "Of peak / mean signal."),
    ),
    "TF and IDF": (
        RecipeFlag("tfidf_mode", "--nr-tfidf-mode", Name(MODES), "What IDF counts: documents, topics or tokens."),
        RecipeFlag("tfidf_k", "--nr-tfidf-k", int, "Number of topics (topic mode)."),
        RecipeFlag("q_active", "--nr-q-active", float, "Quantile from which a neuron is active; higher is stricter."),
        RecipeFlag("signal", "--nr-signal", Name(SIGNALS), "What a neuron's strength is measured on."),
        RecipeFlag("threshold", "--threshold", float, "A gate above it is open (token mode)."),
        RecipeFlag("tokens_per_document", "--tokens-per-document", int, "Tokens sampled from each sequence."),
    ),
    "Factor of neuronrank_unstructured": (
        RecipeFlag("magnitude_multi", "--magnitude-multi", float, "Constant part."),
        RecipeFlag("variance_multi", "--variance-multi", float, "Factor of the variance."),
        RecipeFlag("variance_exp", "--variance-exp", float, "Exponent of the variance."),
        RecipeFlag("token_weight", "--token-weight", float, "Weight of the variance between tokens."),
    ),
    "Calibration": (
        RecipeFlag("nsamples", "--nsamples", int, "Number of sequences."),
        RecipeFlag("seqlen", "--seqlen", int, "Tokens in a sequence, and in a window of --eval."),
        RecipeFlag("bos", "--bos", Name(BOS), BOS_HELP),
        RecipeFlag(
            "update",
            "--update",
            Name(UPDATES),
            "Re-fit the weights that stay to the dense layer's outputs; gradual chooses and re-fits in turn.",
        ),
        RecipeFlag(
            "propagate",
            "--propagate",
            Name(("pruned", "dense")),
            "Whose output the next layer calibrates on: the pruned layer's or the original's.",
        ),
        RecipeFlag("seed", "--seed", int, "Seed of every random number."),
    ),
}
#: How the flag of a field of the recipe is written.
SPELLING = {spec.field: spec.flag.split("/")[0] for section in RECIPE_FLAGS.values() for spec in section}

MODEL = "Model"


def recipe_flags(section: str, only: Collection[str] = SPELLING, heading: str | None = None) -> Decorator:
    """Add flags of one section of :data:`RECIPE_FLAGS`: all of them, or those that set the fields named."""
    defaults = {f.name: f.default for f in fields(Recipe)}

    def add(command: Command) -> Command:
        for spec in reversed([spec for spec in RECIPE_FLAGS[section] if spec.field in only]):
            command = click.option(
                spec.flag,
                spec.field,
                cls=Flag,
                section=heading or section,
                is_flag=spec.kind is bool,
                type=spec.kind,
                default=defaults[spec.field],
                help=spec.help,
                default_text=spec.default_text,
                metavar=spec.metavar,
            )(command)
        return command

    return add


def model_flags(command: Command) -> Command:
    """Add --model, --device and --dtype."""
    what = "A Hugging Face folder or hub id, a .gguf file, or builtin:smollm2-135m."
    return model_flag(what, required=True)(device_flags(command))


def model_flag(what: str, **attributes: Any) -> Decorator:
    """A flag that names a model."""
    return click.option("--model", cls=Flag, section=MODEL, metavar="MODEL", help=what, **attributes)


def device_flags(command: Command) -> Command:
    """Add --device and --dtype."""
    for option in (
        click.option(
            "--dtype",
            cls=Flag,
            section=MODEL,
            type=Name(("auto", "float32", "bfloat16", "float16")),
            default="auto",
            help="Precision of the weights; auto is the checkpoint's own.",
        ),
        click.option(
            "--device",
            cls=Flag,
            section=MODEL,
            metavar="DEVICE",
            default="auto",
            help="cpu, cuda, cuda:N, mps; auto is CUDA where there is one.",
        ),
    ):
        command = option(command)
    return command


def text_flag(flag: str, section: str, what: str, default: str | None = "builtin", **attributes: Any) -> Decorator:
    """A flag that names a text."""
    text = f"{what}: builtin, a .txt or .jsonl file, or a hub name[:config[:split]]."
    return click.option(flag, cls=Flag, section=section, metavar="SOURCE", default=default, help=text, **attributes)


def windows_flag(flag: str, section: str, default: int | None = None) -> Decorator:
    """A flag that says how much of a text to measure on."""
    text = "" if default else "all"
    return count_flag(flag, section, "Windows to measure on.", default_text=text, default=default)


def count_flag(flag: str, section: str, text: str, *, low: int = 1, **attributes: Any) -> Decorator:
    """A flag that takes a whole number from ``low`` on."""
    kind = click.IntRange(min=low)
    return click.option(flag, cls=Flag, section=section, type=kind, metavar="INTEGER", help=text, **attributes)


json_flag = click.option(
    "--json", "as_json", cls=Flag, section=OUTPUT, is_flag=True, help="Print the result as JSON on stdout, alone."
)
hidden_states_flag = click.option(
    "--hidden-states",
    cls=Flag,
    section=OUTPUT,
    type=Name(("memory", "disk")),
    default="memory",
    help="Where the text's hidden states are between layers; disk is a file beside the output.",
)


def force_flag(what: str) -> Decorator:
    """A flag that lets the output be replaced."""
    text = f"Replace {what}; discard an unfinished run of another command."
    return click.option("--force", cls=Flag, section=OUTPUT, is_flag=True, help=text)


def given(ctx: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Those values that the user set: by a flag, in the environment or in a file."""
    unset = (ParameterSource.DEFAULT, None)
    return {name: value for name, value in values.items() if ctx.get_parameter_source(name) not in unset}


def recipe_of(ctx: click.Context, values: dict[str, Any]) -> Recipe:
    """The recipe that a command's values come to: those that the user set beat the preset's."""
    chosen = given(ctx, {name: value for name, value in values.items() if name in SPELLING})
    recipe = Recipe.from_preset(values.get("preset"), **chosen)
    check_recipe(recipe)
    return recipe
