"""Allowed values of dataclass fields, declared with the field."""

import math
from collections.abc import Collection
from dataclasses import field, fields
from typing import Any

from neuronrank_core.errors import InvalidValueError


def number(
    default: float | None,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_ends: bool = False,
    integer: bool = False,
) -> Any:
    """Declare a numeric field in [low, high], or (low, high) with ``open_ends``."""
    kind = "a whole number" if integer else "a number"
    ends = "()" if open_ends else "[]"
    allowed = f"{kind} in {ends[0]}{low:g}, {high:g}{ends[1]}"

    def hint(value: Any) -> str:
        """A percentage in place of a fraction gets a hint."""
        return f"did you mean {value / 100:g}?" if 2 <= value <= 100 and check(value / 100) else ""

    def check(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
            return False
        # Of whole numbers, what fits in 64 bits.
        finite = abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)
        return finite and (low < value < high if open_ends else low <= value <= high)

    return field(default=default, metadata={"check": check, "allowed": allowed, "hint": hint if high == 1 else None})


def one_of(default: Any, choices: Collection[Any]) -> Any:
    """Declare a field with a closed set of values."""
    allowed = "one of " + ", ".join(map(str, choices))
    return field(default=default, metadata={"check": lambda v: v in choices, "allowed": allowed})


def label(default: str) -> Any:
    """Declare a field that holds a name."""
    return field(default=default, metadata={"check": lambda v: isinstance(v, str), "allowed": "a name"})


def flag(default: bool) -> Any:
    """Declare a yes/no field."""
    return field(default=default, metadata={"check": lambda v: isinstance(v, bool), "allowed": "true or false"})


def validate(instance: Any) -> None:
    """Check every field of a dataclass instance; None is valid if it is the field's default.

    Raises
    ------
    InvalidValueError
        Names the field, the value and the allowed range.
    """
    for f in fields(instance):
        value = getattr(instance, f.name)
        if (value is None and f.default is None) or "check" not in f.metadata:
            continue
        if not f.metadata["check"](value):
            hint = f.metadata.get("hint") if isinstance(value, (int, float)) else None
            raise InvalidValueError(f.name, value, f.metadata["allowed"], hint=hint(value) if hint else "")
