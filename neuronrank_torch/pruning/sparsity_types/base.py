"""What a sparsity type says: what it removes and how, and what it changes in the configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from neuronrank_core import Recipe, ScoringContext
from neuronrank_torch.calibration.gram import GramCollector
from neuronrank_torch.model.blocks import Block
from neuronrank_torch.model.structure import Decoder
from neuronrank_torch.pruning.result import ModuleReport


class SparsityType(ABC):
    """What a run removes from each block of a layer. Instances hold no state."""

    #: Whether the re-fit of a block needs its dense weights after the first of them are gone.
    keeps_dense_weights = False

    @abstractmethod
    def handles(self, sparsity_type: str) -> bool:
        """Whether a value of ``--sparsity_type`` is of this type."""

    @abstractmethod
    def stages(self, recipe: Recipe) -> list[tuple[str, ...]]:
        """Inputs whose Gram matrices the re-fit needs, by role: one pass over the text for each group, in order.

        With pruned propagation a group sees what the groups before it, already pruned, hand on.
        """

    @abstractmethod
    def planned(self, block: Block, recipe: Recipe) -> dict[str, ModuleReport]:
        """What will be removed from a block, by its shapes alone.

        Raises
        ------
        InvalidValueError
            If the shapes do not allow it.
        """

    @abstractmethod
    def remove(self, block: Block, context: ScoringContext, gram: GramCollector | None) -> Any:
        """Choose and remove; re-fit what the inputs in ``gram`` allow. Returns what :meth:`refit` needs to know."""

    def refit(self, block: Block, context: ScoringContext, chosen: Any, gram: GramCollector) -> None:
        """Re-fit the modules of a block whose inputs are in ``gram``, which a later stage collected."""
        del block, context, chosen, gram

    def change_config(self, decoder: Decoder) -> None:
        """State in the model's configuration what has changed in all of its layers."""
        del decoder
