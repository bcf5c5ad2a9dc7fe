"""Flags: those of a recipe, declared in a table, and those that several commands share."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import click
from click.core import ParameterSource

from neuronrank_cli.command import OUTPUT, Flag
from neuronrank_cli.console import warn
from neuronrank_core.effort import effort_settings
from neuronrank_core.methods import ALL_METHODS, METHODS, check_method, check_recipe
from neuronrank_core.recipe import ALLOCATIONS, COMPARE, MODES, SIGNALS, UPDATE_TARGETS, UPDATES, Exponents, Recipe

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


class Name(click.Choice[str]):
    """A choice of names in which dashes and underscores are interchangeable; shown with underscores."""

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


def _exponent(field: str, flag: str, text: str) -> RecipeFlag:
    """A flag for an exponent. Its default in words names the methods with a different one."""
    common = getattr(Exponents(), field)
    own = {m.name: m.defaults[field] for m in METHODS.values() if m.defaults.get(field, common) != common}
    experts = {f"the experts of {m.name}": m.expert_defaults.get(field) for m in ALL_METHODS.values()}
    own |= {whose: value for whose, value in experts.items() if value is not None}
    default_text = "; ".join([f"{common:g}", *(f"{value:g} for {whose}" for whose, value in own.items())])
    return RecipeFlag(field, flag, float, text, default_text)


_SPARSITY_HELP = (
    "unstructured; N:M such as 2:4, to zero N of every M weights; neurons, to remove whole neurons; heads, to remove"
    " attention heads (one way alone: key-value-groups, query-heads); experts, to remove whole experts of a mixture; or"
    " layers, to remove whole layers"
    " by measured cost (layers-by-influence: by block influence). Weights that are already zero count; where there are"
    " more than asked for, all stay zero. Only --update after a removal of neurons, heads or layers fills them."
)
_BOS_HELP = "Where to add a beginning-of-sequence token, if the tokenizer adds one: to every window or to the text."

#: Flags by section of the help.
RECIPE_FLAGS = {
    "What to prune": (
        RecipeFlag(
            "method", "--prune_method", Name(tuple(ALL_METHODS)), "Scoring method, see Methods below.", "", "METHOD"
        ),
        RecipeFlag("sparsity_type", "--sparsity_type", str, _SPARSITY_HELP),
        RecipeFlag(
            "sparsity_ratio",
            "--sparsity_ratio",
            float,
            "Fraction of weights to zero, or of neurons, heads, experts or layers to remove.",
            "0.5, or N/M",
        ),
        RecipeFlag(
            "multiple_of",
            "--multiple-of",
            int,
            "With neurons: remove fewer, so that N divides the number that stays. Kernels are fast at multiples of 64.",
            "no rounding; with --target-params or --max-loss, up to 64",
        ),
        RecipeFlag(
            "divisible_by",
            "--divisible-by",
            int,
            "With heads: N divides the numbers of heads and of key-value groups that stay, for tensor parallelism.",
        ),
        RecipeFlag(
            "allocate",
            "--allocate",
            Name(ALLOCATIONS),
            "Where the zeros go: uniform; modules, fewer in down than in gate and up (for --update gradual);"
            " neuronrank, more in layers where pruning costs less (takes an extra pass); both, the last two together.",
        ),
        RecipeFlag("pruning_last", "--pruning_last", int, "Prune only the last N layers.", "all layers"),
        RecipeFlag(
            "compare", "--compare", Name(COMPARE), "Comparison group for selecting weights.", "depends on the method"
        ),
        RecipeFlag(
            "include_attention",
            "--nr-include-attention/--nr-skip-attention",
            bool,
            "Also prune the attention projections q/k/v/o, with Wanda's score (magnitude's with magnitude).",
            "skip",
        ),
        RecipeFlag(
            "prune_lm_head",
            "--nr-prune-lm-head",
            bool,
            "Also prune the output head. It must not be tied to the embeddings.",
        ),
    ),
    "Exponents of the score": (
        _exponent("weight_exp", "--weight-exp", "Exponent of the weight magnitude."),
        _exponent("input_exp", "--input-exp", "Exponent of the input norm."),
        _exponent("tf_exp", "--tf-exp", "Exponent of TF: how strongly the neuron fires."),
        _exponent("idf_exp", "--idf-exp", "Exponent of IDF: how selectively it fires."),
        _exponent("spikiness_exp", "--nr-spikiness-exp", "Exponent of spikiness: peak signal / mean signal."),
    ),
    "TF and IDF": (
        RecipeFlag(
            "tfidf_mode", "--nr-tfidf-mode", Name(MODES), "Groups that IDF counts: documents, topics or tokens."
        ),
        RecipeFlag("tfidf_k", "--nr-tfidf-k", int, "Number of topics. Topic mode only."),
        RecipeFlag(
            "q_active", "--nr-q-active", float, "Quantile above which a neuron counts as active; higher is stricter."
        ),
        RecipeFlag(
            "signal",
            "--nr-signal",
            Name(SIGNALS),
            "Activation on which the strength of a neuron is measured; in MLPs without a gate it is always product.",
        ),
        RecipeFlag(
            "threshold",
            "--threshold",
            float,
            "Value above which a gate (without one, the neuron's pre-activation) counts as open. Token mode only.",
        ),
        RecipeFlag("tokens_per_document", "--tokens-per-document", int, "Tokens sampled from each sequence."),
    ),
    "Factor of neuronrank_unstructured": (
        RecipeFlag("magnitude_multi", "--magnitude-multi", float, "Constant term."),
        RecipeFlag("variance_multi", "--variance-multi", float, "Coefficient of the variance."),
        RecipeFlag("variance_exp", "--variance-exp", float, "Exponent of the variance."),
        RecipeFlag("token_weight", "--token-weight", float, "Weight of the variance between tokens."),
    ),
    "Calibration": (
        RecipeFlag("nsamples", "--nsamples", int, "Number of sequences."),
        RecipeFlag("seqlen", "--seqlen", int, "Tokens per sequence, and per window of the evaluation."),
        RecipeFlag("bos", "--bos", Name(("window", "text")), _BOS_HELP),
        RecipeFlag(
            "update",
            "--update",
            Name(UPDATES),
            "Re-fit the remaining weights to the outputs of the original layer; gradual alternates selecting and "
            "re-fitting.",
        ),
        RecipeFlag(
            "update_iterations",
            "--update-iterations",
            int,
            "Iterations of --update on weights. Fewer take less time and fit worse.",
        ),
        RecipeFlag(
            "update_target",
            "--update-target",
            Name(UPDATE_TARGETS),
            "What --update fits the outputs of an MLP to: those of the original layer on the same inputs, or what "
            "brings the hidden states back to those of the original model.",
        ),
        RecipeFlag(
            "propagate",
            "--propagate",
            Name(("pruned", "dense")),
            "Calibrate each layer on the outputs of the pruned or of the original previous layers.",
        ),
        RecipeFlag("seed", "--seed", int, "Random seed."),
    ),
}
#: The flag of each field of the recipe.
SPELLING = {spec.field: spec.flag.split("/")[0] for section in RECIPE_FLAGS.values() for spec in section}

MODEL = "Model"


def flag(name: str, section: str, text: str, *, into: str = "", **attributes: Any) -> Decorator:
    """A flag in a section of the help. Sets the parameter ``into``, by default the one with the name of the flag."""
    names = (name, into) if into else (name,)
    return click.option(*names, cls=Flag, section=section, help=text, **attributes)


def recipe_flags(
    section: str, only: Collection[str] = SPELLING, heading: str = "", unset: Mapping[str, str] | None = None
) -> Decorator:
    """Add flags of a section of :data:`RECIPE_FLAGS`: all of them, or those of the fields in ``only``.

    Fields in ``unset`` have no default. It says what happens if they are not set.
    """
    defaults = {f.name: f.default for f in fields(Recipe)} | dict.fromkeys(unset or ())

    def add(command: Command) -> Command:
        for spec in reversed([spec for spec in RECIPE_FLAGS[section] if spec.field in only]):
            command = flag(
                spec.flag,
                heading or section,
                spec.help,
                into=spec.field,
                is_flag=spec.kind is bool,
                type=spec.kind,
                default=defaults[spec.field],
                default_text=(unset or {}).get(spec.field, spec.default_text),
                metavar=spec.metavar,
            )(command)
        return command

    return add


def model_flags(command: Command) -> Command:
    """Add --model, --device and --dtype."""
    what = "Hugging Face folder or hub id, .gguf file, or builtin:smollm2-135m."
    return model_flag(what, required=True)(device_flags(command))


def model_flag(what: str, **attributes: Any) -> Decorator:
    """A flag that names a model."""
    return flag("--model", MODEL, what, metavar="MODEL", **attributes)


def device_flags(command: Command) -> Command:
    """Add --device and --dtype."""
    where = "cpu, cuda, cuda:N or mps; auto selects CUDA if available."
    device = flag("--device", MODEL, where, metavar="DEVICE", default="auto")
    precisions = Name(("auto", "float32", "bfloat16", "float16"))
    what = "Precision of the weights; auto keeps that of the checkpoint."
    return device(flag("--dtype", MODEL, what, type=precisions, default="auto")(command))


def text_flag(
    name: str, section: str, what: str, default: str | None = "builtin", also: str = "", **attributes: Any
) -> Decorator:
    """A flag that names a text; ``also`` is what it takes besides."""
    text = f"{what}: {also}builtin, a .txt or .jsonl file (texts or chats), or a hub data set, NAME[:CONFIG[:SPLIT]]."
    return flag(name, section, text, metavar="SOURCE", default=default, **attributes)


def calibration_flag(section: str) -> Decorator:
    """The flag that names the calibration text, which the model can also write itself."""
    return text_flag("--dataset", section, "Calibration text", also="self (written by the model), ")


def windows_flag(name: str, section: str, default: int | None = None) -> Decorator:
    """A flag for the number of windows to evaluate."""
    text = "" if default else "all"
    return count_flag(name, section, "Number of windows to evaluate.", default_text=text, default=default)


def count_flag(name: str, section: str, text: str, *, low: int = 1, **attributes: Any) -> Decorator:
    """A flag that takes a whole number of at least ``low``."""
    return flag(name, section, text, type=click.IntRange(min=low), metavar="INTEGER", **attributes)


def eval_flag(section: str, text: str) -> Decorator:
    """A flag that asks for the perplexity."""
    return flag("--eval", section, text, into="evaluate", is_flag=True)


def force_flag(what: str) -> Decorator:
    """A flag that allows the output to be replaced."""
    text = f"Replace {what}, and discard an unfinished run of a different command."
    return flag("--force", OUTPUT, text, is_flag=True)


json_flag = flag(
    "--json", OUTPUT, "Print the result as JSON, with nothing else on stdout.", into="as_json", is_flag=True
)
hidden_states_flag = flag(
    "--hidden-states",
    OUTPUT,
    "Where to store hidden states between layers; disk uses a file next to the output.",
    type=Name(("memory", "disk")),
    default="memory",
)


def fields_of(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are fields of a dataclass."""
    return {f.name: values[f.name] for f in fields(kind) if f.name in values}


def given(ctx: click.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the user set: by a flag, in the environment or in a file."""
    unset = (ParameterSource.DEFAULT, None)
    return {name: value for name, value in values.items() if ctx.get_parameter_source(name) not in unset}


def warn_of_idle(ctx: click.Context, reasons: Mapping[str, str]) -> None:
    """Warn of the flags that the user set and that have no effect, with the reasons."""
    flags = {p.name: p.opts[0] for p in ctx.command.params}
    for name, reason in given(ctx, reasons).items():
        warn(f"{flags[name]} has no effect {reason}")


def warn_of_signal(ctx: click.Context, chosen: str, measured: str) -> None:
    """Warn if the user set a signal that the model does not have."""
    if given(ctx, {"signal": chosen}) and measured != chosen:
        warn(f"--nr-signal {chosen} has no effect on MLPs without a gate: their signal is always the {measured}")


def settings_of_target(values: dict[str, Any]) -> dict[str, Any]:
    """What --target-params or --max-loss, if there is one, sets in a recipe."""
    asked = any(values.get(name) is not None for name in ("target_params", "max_loss"))
    return {"sparsity_type": "neurons", "update": "least-squares"} if asked else {}


def recipe_of(ctx: click.Context, values: dict[str, Any]) -> Recipe:
    """The recipe for the values of a command. Values that the user set take precedence over preset and effort."""
    effort = values.get("effort")
    chosen: dict[str, Any] = {} if effort is None else effort_settings(effort, values["sparsity_type"])
    chosen |= settings_of_target(values)
    recipe = Recipe.from_preset(values.get("preset"), **{**chosen, **given(ctx, fields_of(Recipe, values))})
    # Statistics bring their own number of tokens, by which the rest is checked when they are read.
    (check_recipe if values.get("stats") is None else check_method)(recipe)
    return recipe
