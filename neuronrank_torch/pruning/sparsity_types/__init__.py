"""Sparsity types, one file each, found in this folder."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from neuronrank_core import Recipe
from neuronrank_torch.pruning.sparsity_types.base import SparsityType

#: Every sparsity type by file name.
SPARSITY_TYPES: dict[str, SparsityType] = {
    module.name: import_module(f"{__name__}.{module.name}").SPARSITY_TYPE
    for module in iter_modules(__path__)
    if module.name != "base"
}


__all__ = ["SPARSITY_TYPES", "SparsityType", "sparsity_type_of"]


def sparsity_type_of(recipe: Recipe) -> SparsityType:
    """The :class:`SparsityType` that handles the recipe's ``sparsity_type``."""
    [found] = [one for one in SPARSITY_TYPES.values() if one.handles(recipe.sparsity_type)]
    return found
