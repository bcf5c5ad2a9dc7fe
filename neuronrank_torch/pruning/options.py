"""A pass through the dense model that decides what a sparsity type leaves open for all layers."""

from collections.abc import Sequence

from neuronrank_core import LayerStatistics, Recipe
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.layerwise import LayerRun
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.structure import Layer
from neuronrank_torch.pruning.layer import LayerPlan


class OptionPass:
    """Visits the dense layers in order, for :func:`neuronrank_torch.calibration.layerwise.run_layers`.

    Parameters
    ----------
    options : sequence of Recipe
        From :meth:`SparsityType.options`.
    kernels : TorchKernels
    ranks : Ranks
        Processes that share the text.
    """

    def __init__(self, options: Sequence[Recipe], kernels: TorchKernels, ranks: Ranks) -> None:
        self.plans, self.ranks = [LayerPlan(option, kernels) for option in options], ranks
        #: By option, the sum over the layers of the share of the score that it would remove.
        self.lost = [0.0] * len(options)

    def visit(self, run: LayerRun) -> None:
        """Run a dense layer and compare the options."""
        first, tokens = self.plans[0], run.hidden.shape[1]
        blocks = first.sparsity_type.blocks(run.layer, first.recipe)
        with LayerCollector(run.layer, blocks, first.recipe, tokens) as collector:
            run.feed(keep=True, after=lambda start: collector.add_documents(start, tokens))
        self.compare(run.layer, collector.statistics(self.ranks))

    def compare(self, layer: Layer, tables: Sequence[LayerStatistics | None]) -> None:
        """Add what each option would remove from a dense layer."""
        for number, plan in enumerate(self.plans):
            for block, table in zip(plan.sparsity_type.blocks(layer, plan.recipe), tables, strict=True):
                self.lost[number] += plan.sparsity_type.lost(block, plan.context(block, table))

    def best(self) -> Recipe:
        """The option that removes the smallest share of the scores; of equal ones, the first."""
        return self.plans[self.lost.index(min(self.lost))].recipe
