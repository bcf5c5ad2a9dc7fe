"""The pruning methods, one file each, and what a recipe comes to with its method."""

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
