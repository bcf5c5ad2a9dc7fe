"""Flags: those of a recipe, declared once as a table, and those that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import click
from click.core import ParameterSource

from neuronrank_core.methods import METHODS
from neuronrank_core.recipe import MODES, Exponents, Recipe
from neuronrank_core.selection import COMPARE
from neuronrank_core.statistics import SIGNALS


@dataclass(frozen=True)
class RecipeFlag:
    """A flag that sets one field of a :class:`Recipe`."""

    field: str
    flag: str
    kind: Any
    help: str
    default_text: str = ""


class Name(click.Choice[str]):
    """A choice among names in which dashes and underscores are interchangeable too, shown with underscores."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        """Compare names with underscores."""
        del ctx
        return str(choice).replace("-", "_")


def _exponent_default(name: str) -> str:
    """The exponent's default, and the methods that have another."""
    common = getattr(Exponents(), name)
    own = {m.name: m.defaults[name] for m in METHODS.values() if m.defaults.get(name, common) != common}
    return "; ".join([f"{common:g}", *(f"{value:g} for {method}" for method, value in own.items())])


def _exponent(field: str, flag: str, text: str) -> RecipeFlag:
    return RecipeFlag(field, flag, float, text, _exponent_default(field))


RECIPE_FLAGS = (
    RecipeFlag("method", "--prune_method", Name(tuple(METHODS)), "How weights are scored."),
    RecipeFlag("sparsity_type", "--sparsity_type", str, "unstructured, or N:M such as 2:4: N of every M go."),
    RecipeFlag("sparsity_ratio", "--sparsity_ratio", float, "Share of weights to zero, 0 to 1.", "0.5, or N/M"),
    RecipeFlag("pruning_last", "--pruning_last", int, "Prune the last N layers only.", "all layers"),
    RecipeFlag("compare", "--compare", Name(COMPARE), "Weights that compete.", "the method's"),
    RecipeFlag("tfidf_mode", "--nr-tfidf-mode", Name(MODES), "Groups for TF and IDF: documents, topics or tokens."),
    RecipeFlag("tfidf_k", "--nr-tfidf-k", int, "Number of topics (topic mode)."),
    RecipeFlag(
        "q_active", "--nr-q-active", float, "Quantile from which a neuron counts as active; higher is stricter."
    ),
    RecipeFlag("signal", "--nr-signal", Name(SIGNALS), "What a neuron's strength is measured on."),
    RecipeFlag("threshold", "--threshold", float, "A gate above it is open (token mode)."),
    RecipeFlag("tokens_per_document", "--tokens-per-document", int, "Tokens sampled from each sequence."),
    _exponent("weight_exp", "--weight-exp", "Exponent of the weight's magnitude."),
    _exponent("input_exp", "--input-exp", "Exponent of the input's norm."),
    _exponent("tf_exp", "--tf-exp", "Exponent of TF, how strongly the neuron fires."),
    _exponent("idf_exp", "--idf-exp", "Exponent of IDF, how selectively it fires."),
    _exponent("spikiness_exp", "--nr-spikiness-exp", "Exponent of peak / mean signal."),
    RecipeFlag("magnitude_multi", "--magnitude-multi", float, "neuronrank_unstructured: constant part."),
    RecipeFlag("variance_multi", "--variance-multi", float, "neuronrank_unstructured: factor of the variance."),
    RecipeFlag("variance_exp", "--variance-exp", float, "neuronrank_unstructured: exponent of the variance."),
    RecipeFlag("token_weight", "--token-weight", float, "neuronrank_unstructured: weight of the tokens' variance."),
    RecipeFlag(
        "propagate",
        "--propagate",
        Name(("pruned", "dense")),
        "Which layer's output the next one calibrates on.",
    ),
    RecipeFlag("nsamples", "--nsamples", int, "Calibration sequences."),
    RecipeFlag("seed", "--seed", int, "Seed of every random number."),
)

seqlen_option = click.option("--seqlen", type=int, default=Recipe.seqlen, help="Tokens in a sequence or window.")
bos_option = click.option(
    "--bos",
    type=Name(("window", "text")),
    default=Recipe.bos,
    help="Where a beginning-of-sequence token stands, for tokenizers that add one.",
)
batch_size_option = click.option(
    "--batch-size", type=click.IntRange(min=1), help="Sequences in a micro-batch.  [default: automatic]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout, alone.")

Command = Callable[..., Any]


def recipe_options(command: Command) -> Command:
    """Add every flag of a recipe."""
    defaults = {f.name: f.default for f in fields(Recipe)}
    command = click.option("--nr-prune-lm-head", "prune_lm_head", is_flag=True, help="Prune the head too.")(command)
    command = click.option(
        "--nr-include-attention/--nr-skip-attention", "include_attention", help="Prune q/k/v/o too, with Wanda's score."
    )(command)
    command = seqlen_option(bos_option(command))
    for spec in reversed(RECIPE_FLAGS):
        command = click.option(
            spec.flag,
            spec.field,
            type=spec.kind,
            default=defaults[spec.field],
            help=spec.help,
            show_default=spec.default_text or True,
        )(command)
    return command


def model_options(command: Command) -> Command:
    """Add --model, --device and --dtype."""
    for option in (
        click.option(
            "--dtype",
            type=Name(("auto", "float32", "bfloat16", "float16")),
            default="auto",
            help="Precision of the weights; auto is the checkpoint's own.",
        ),
        click.option("--device", default="auto", help="cpu, cuda, cuda:N, mps; auto is CUDA where there is one."),
        click.option(
            "--model",
            required=True,
            help="A Hugging Face folder or hub id, a .gguf file, or builtin:smollm2-135m.",
            show_default=False,
        ),
    ):
        command = option(command)
    return command


def given(ctx: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Those values that the user set, by a flag or in the environment."""
    unset = (ParameterSource.DEFAULT, None)
    return {name: value for name, value in values.items() if ctx.get_parameter_source(name) not in unset}


def flag_of(field: str) -> str:
    """The flag that sets a field of the recipe."""
    return next((spec.flag for spec in RECIPE_FLAGS if spec.field == field), "--" + field.replace("_", "-"))
