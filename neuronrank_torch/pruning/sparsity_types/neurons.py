"""Removal of whole neurons, which leaves a smaller model with an unchanged architecture."""

from typing import Any

import torch

from neuronrank_core import Recipe, ScoringContext
from neuronrank_core.selection.whole_neurons import kept_neurons
from neuronrank_core.update.least_squares import absorb
from neuronrank_torch.calibration.gram import GramCollector
from neuronrank_torch.kernels import inverse
from neuronrank_torch.model.blocks import Block, Mlp
from neuronrank_torch.model.structure import Decoder
from neuronrank_torch.pruning.result import ModuleReport
from neuronrank_torch.pruning.sparsity_types.base import SparsityType


class Neurons(SparsityType):
    """Removes the lowest-scoring neurons, the same number in every layer."""

    def handles(self, sparsity_type: str) -> bool:
        """``neurons``."""
        return sparsity_type == "neurons"

    def stages(self, recipe: Recipe) -> list[tuple[str, ...]]:
        """Only ``down_proj`` is updated."""
        del recipe
        return [("down_proj",)]

    def planned(self, block: Block, recipe: Recipe) -> dict[str, ModuleReport]:
        """The weights that are removed with the neurons."""
        neurons = block.projections["down_proj"].weight.shape[1]
        goes = int(recipe.ratio * neurons)
        sizes = {role: weight.numel() for role, weight in block.weights.items()}
        return {block.prefix + role: ModuleReport(size, 0, goes * (size // neurons)) for role, size in sizes.items()}

    def remove(self, block: Block, context: ScoringContext, gram: GramCollector | None) -> None:
        """Remove the lowest-scoring neurons; with ``gram``, let the remaining ones compensate for them."""
        assert isinstance(block, Mlp)
        down = block.projections["down_proj"].weight
        kept = torch.as_tensor(kept_neurons(context), device=down.device)
        new = down[:, kept] if gram is None else absorb(down.float(), kept, gram.gram["down_proj"], inverse)
        block.remove_neurons(kept, new)

    def change_config(self, decoder: Decoder) -> None:
        """Set ``intermediate_size`` to the number of remaining neurons, which is the same in every layer."""
        config: Any = decoder.body.config
        config.intermediate_size = decoder.layers[0].mlp.projections["down_proj"].weight.shape[1]


SPARSITY_TYPE = Neurons()
