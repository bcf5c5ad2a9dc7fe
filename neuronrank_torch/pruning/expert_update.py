"""Updates the experts of a layer, one after another, by the tokens that are routed to each."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from neuronrank_core import Recipe, ScoringContext
from neuronrank_torch.calibration.layerwise import LayerRun
from neuronrank_torch.calibration.routed import ExpertSums, RoutedTokens
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.model.blocks import MLP_PROJECTIONS, Block, Mlp, routed
from neuronrank_torch.pruning.sparsity_types import SparsityType


class ExpertUpdate:
    """Prunes and updates the experts of one layer; a pass over the text keeps what they get.

    Parameters
    ----------
    tokens : RoutedTokens
    kind : SparsityType
    recipe : Recipe
    ranks : Ranks
        Processes that share the text.
    """

    def __init__(self, tokens: RoutedTokens, kind: SparsityType, recipe: Recipe, ranks: Ranks) -> None:
        self.tokens, self.kind, self.ranks = tokens, kind, ranks
        stages = kind.stages(recipe)
        #: The inputs of the pass that keeps the tokens.
        self.stage = next(stage for stage in stages if {*stage} & {*MLP_PROJECTIONS})
        self.at_once = self.stage == stages[0]
        mlp = [tuple(role for role in stage if role in MLP_PROJECTIONS) for stage in stages]
        #: Inputs whose sums are computed together; those of later ones come from the pruned experts.
        self.groups = [group for group in mlp if group]

    @classmethod
    def of(cls, run: LayerRun, kind: SparsityType, recipe: Recipe, ranks: Ranks) -> ExpertUpdate | None:
        """The update of a layer; None if it has no experts to update."""
        if run.layer.experts is None or recipe.update == "none" or not any(map(routed, kind.blocks(run.layer, recipe))):
            return None
        tokens = RoutedTokens(run.layer.experts, run.spare("experts", run.hidden.shape[2]))
        return cls(tokens, kind, recipe, ranks)

    def recorded(self, stage: tuple[str, ...]) -> AbstractContextManager[Any]:
        """Context for the pass of a stage, which keeps the tokens if it is the one for it."""
        return self.tokens if stage == self.stage else nullcontext()

    def remove(self, block: Block, dense: Block, context: ScoringContext) -> Any:
        """Prune an expert, and update it if its tokens are known."""
        if not self.at_once:
            return self.kind.remove(block, context, None)
        first, *later = self.groups
        chosen = self.kind.remove(block, context, self._sums(block, first))
        for group in later:
            self.kind.refit(block, context, chosen, self._sums(block, group, dense))
        return chosen

    def refit(self, stage: tuple[str, ...], block: Block, dense: Block, context: ScoringContext, chosen: Any) -> None:
        """Update an expert that :meth:`remove` did not, after the pass of the stage that keeps the tokens."""
        if stage == self.stage:
            for group in self.groups:
                self.kind.refit(block, context, chosen, self._sums(block, group, dense))

    def _sums(self, block: Block, group: tuple[str, ...], dense: Block | None = None) -> ExpertSums:
        assert isinstance(block, Mlp)
        experts = self.tokens.experts
        before = replace(experts, module=dense.projections["down_proj"].module) if dense else None
        return self.tokens.sums(block, group, self.ranks, before)
