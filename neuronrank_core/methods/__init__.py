"""The pruning methods, one file each, and a recipe's settings resolved with its method's defaults."""

from neuronrank_core.methods.base import Method
from neuronrank_core.methods.registry import (
    METHODS,
    check_recipe,
    exponents,
    method_for,
    method_of,
    mode,
    needs_text,
    requires,
    without_effect,
)

__all__ = [
    "METHODS",
    "Method",
    "check_recipe",
    "exponents",
    "method_for",
    "method_of",
    "mode",
    "needs_text",
    "requires",
    "without_effect",
]
