"""Sparsity types, one file each, found in this folder."""

from neuronrank_core import Recipe
from neuronrank_core.registry import declared
from neuronrank_torch.pruning.sparsity_types.base import SparsityType

#: Every sparsity type by file name.
SPARSITY_TYPES: dict[str, SparsityType] = declared(__name__, __path__, "SPARSITY_TYPE", besides=("base",))

__all__ = ["SPARSITY_TYPES", "SparsityType", "sparsity_type_of"]


def sparsity_type_of(recipe: Recipe) -> SparsityType:
    """The :class:`SparsityType` that handles the recipe's ``sparsity_type``."""
    [found] = [one for one in SPARSITY_TYPES.values() if one.handles(recipe.sparsity_type)]
    return found
