"""Base class of the sparsity types."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from neuronrank_core import Recipe, ScoringContext
from neuronrank_torch.calibration.gram import Sums
from neuronrank_torch.model.blocks import Block
from neuronrank_torch.model.structure import Decoder, Layer
from neuronrank_torch.pruning.result import ModuleReport


class SparsityType(ABC):
    """Defines what is removed from a block, how, and how the configuration changes. Instances are stateless."""

    #: Whether the update of a block needs its dense weights after pruning has started.
    keeps_dense_weights = False

    @abstractmethod
    def handles(self, sparsity_type: str) -> bool:
        """Whether a value of ``--sparsity_type`` denotes this type."""

    @abstractmethod
    def speed(self, recipe: Recipe) -> str:
        """Whether a pruned model is faster, and why."""

    def check(self, model: Any, decoder: Decoder, recipe: Recipe) -> None:
        """Refuse a dense model that this type cannot prune; raises InputError."""
        del model, decoder, recipe

    def blocks(self, layer: Layer, recipe: Recipe) -> Sequence[Block]:
        """The blocks of a layer that are pruned; raises InputError if the layer lacks them."""
        return layer.blocks(include_attention=recipe.include_attention)

    def options(self, model: Any, decoder: Decoder, recipe: Recipe) -> list[Recipe]:
        """The recipes between which the scores of all layers decide; a single one if nothing is left open."""
        del model, decoder
        return [recipe]

    def lost(self, block: Block, context: ScoringContext) -> float:
        """Share of a dense block's score that an option would remove."""
        raise NotImplementedError

    def resume(self, layer: Layer) -> None:
        """Adapt a layer that an earlier process pruned and whose tensors have their final shapes."""
        del layer

    def notes(self, decoder: Decoder, recipe: Recipe) -> list[str]:
        """What the result says about the option that was chosen; called before the configuration is changed."""
        del decoder, recipe
        return []

    @abstractmethod
    def stages(self, recipe: Recipe) -> list[tuple[str, ...]]:
        """Groups of inputs, by role, whose Gram matrices the update needs; one pass over the text per group.

        With pruned propagation, the inputs of a group come from the pruned modules of earlier groups.
        """

    @abstractmethod
    def planned(self, block: Block, recipe: Recipe, *, counted: bool = False) -> dict[str, ModuleReport]:
        """What will be removed from a block, computed from its shapes; with ``counted``, also from its zeros.

        Raises
        ------
        InvalidValueError
            If the shapes do not allow it.
        """

    def shrinkage(self, block: Block, recipe: Recipe) -> int:
        """Number of parameters that leave the model with what is removed from a block."""
        del block, recipe
        return 0

    @abstractmethod
    def remove(self, block: Block, context: ScoringContext, gram: Sums | None) -> Any:
        """Prune a block and update the modules whose inputs are in ``gram``. Returns ``chosen`` for :meth:`refit`."""

    def finish(self, blocks: Sequence[Block], chosen: Sequence[Any]) -> None:
        """Complete the removal from all blocks of a layer, given what :meth:`remove` returned for each."""
        del blocks, chosen

    def refit(self, block: Block, context: ScoringContext, chosen: Any, gram: Sums) -> None:
        """Update the modules of a block whose inputs are in ``gram``, which was collected in a later stage."""
        del block, context, chosen, gram

    def experts_removed(self, chosen: Any) -> tuple[int, ...]:
        """Indices of the experts that :meth:`remove` removed, from what it returned."""
        del chosen
        return ()

    def change_config(self, decoder: Decoder) -> None:
        """Adapt the model's configuration after all layers have been pruned."""
        del decoder
