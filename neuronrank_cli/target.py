"""Flags for the size or the loss of a smaller model."""

from collections.abc import Mapping
from typing import Any

import click

from neuronrank_cli.options import SPELLING, Decorator, flag, given
from neuronrank_core.mixes import Target

#: Flags that a target stands for, or cannot have.
_OF_TARGET = ("sparsity_type", "sparsity_ratio", "effort", "stats")


class Share(click.ParamType[float]):
    """A number, which may be given as a percentage."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; fails if it is none."""
        text = str(value)
        try:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return self.fail(f"{text!r} is not a number, such as 0.1 or 10%.", param, ctx)


def target_flags(section: str) -> Decorator:
    """Add --target-params and --max-loss."""
    size = flag(
        "--target-params",
        section,
        "Remove neurons, heads and layers until at most this share stays of the parameters outside input and output"
        " embeddings. Several mixes are compared on held-out calibration text. Implies --update least-squares.",
        type=Share(),
        metavar="SHARE",
    )
    loss = flag(
        "--max-loss",
        section,
        "The same, with the smallest model whose perplexity on held-out calibration text rises by at most this share,"
        " such as 0.1 or 10%.",
        type=Share(),
        metavar="SHARE",
    )
    return lambda command: size(loss(command))


def target_of(ctx: click.Context, values: Mapping[str, Any]) -> Target | None:
    """The size or loss that the user asked for; raises UsageError if other flags say what to remove."""
    asked = {name: values[name] for name in ("target_params", "max_loss") if values[name] is not None}
    if not asked:
        return None
    names = [f"--{name.replace('_', '-')}" for name in asked]
    others = [SPELLING.get(name, f"--{name}") for name in given(ctx, dict.fromkeys(_OF_TARGET))]
    if len(names) + len(others) > 1:
        raise click.UsageError(f"{names[0]} chooses what to remove: leave out {', '.join([*names[1:], *others])}", ctx)
    return Target(**asked)
