"""Prunes one decoder layer: calibrate, score, mask, re-fit, propagate."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from neuronrank_core import Recipe, ScoringContext, prune_mask
from neuronrank_core.methods import requires
from neuronrank_core.selection.masks import gradual_mask
from neuronrank_core.selection.whole_neurons import kept_neurons
from neuronrank_core.statistics.table import SHARED_INPUT, LayerStatistics
from neuronrank_core.update.least_squares import absorb, gradual_update, least_squares_update
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.gram import GramCollector, gated_product
from neuronrank_torch.calibration.layerwise import LayerRun
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.kernels import TorchKernels, inverse
from neuronrank_torch.model.structure import activation_of, gated_mlp, prunable_linears
from neuronrank_torch.pruning.result import LayerReport, ModuleReport
from neuronrank_torch.pruning.sparsity_types.neurons import remove_neurons

Activation = Callable[[Tensor], Tensor]
Weights = dict[str, Tensor]


class LayerPruner:
    """What the visits of a run's layers share.

    Parameters
    ----------
    recipe : Recipe
    kernels : TorchKernels
    on_batch : callable
        Called with the layer's number after each micro-batch.
    ranks : Ranks
        Who shares the text; all prune by the statistics of all of it.
    """

    def __init__(
        self, recipe: Recipe, kernels: TorchKernels, on_batch: Callable[[int], None], ranks: Ranks = ALONE
    ) -> None:
        self.recipe, self.kernels, self.on_batch, self.ranks = recipe, kernels, on_batch, ranks
        #: Sparsity ratios by layer, where they are not the recipe's.
        self.ratios: dict[int | str, float] = {}

    @property
    def _stages(self) -> list[tuple[str, ...]]:
        """Groups of inputs in the order in which their Gram matrices are taken, one pass each.

        With pruned propagation a group sees what the groups before it, already pruned, hand on.
        """
        if self.recipe.whole_neurons:
            return [("down_proj",)]
        attention = ("q_proj", "o_proj") if self.recipe.include_attention else ()
        inputs = (*attention, "gate_proj", "down_proj")
        return [(name,) for name in inputs] if self.recipe.propagate == "pruned" else [inputs]

    def passes(self, *, outputs_needed: bool) -> int:
        """How often a pruned layer runs over the calibration text."""
        calibrate = len(self._stages) if self.recipe.update != "none" else 1
        return calibrate + (outputs_needed and self.recipe.propagate == "pruned")

    def visit(self, run: LayerRun, *, outputs_needed: bool) -> LayerReport:
        """Calibrate, prune and propagate one layer."""
        started = time.perf_counter()
        linears = prunable_linears(run.layer, run.index, include_attention=self.recipe.include_attention)
        activation = activation_of(run.layer, run.index)
        keep, updating = self.recipe.propagate == "dense", self.recipe.update != "none"
        collector = LayerCollector(run.index, linears, activation, self.recipe)
        first = GramCollector(run.index, linears, self._stages[0] if updating else ())
        with collector, first:
            self._feed(run, keep=keep, after=lambda start: collector.add_documents(start, run.hidden.shape[1]))
        statistics = collector.statistics(self.ranks) if requires(self.recipe) else None
        first.sum_over(self.ranks)
        if self.recipe.whole_neurons:
            modules = self._remove_neurons(run.index, run.layer, linears, statistics, first.gram)
        else:
            dense = {name: linear.weight.clone() for name, linear in linears.items()} if updating else {}
            masks = self.mask(run.index, linears, statistics)
            if updating:
                refit(linears, self._context(run.index, dense, statistics), masks, first)
                self._later_stages(run, linears, dense, statistics, masks, activation)
            modules = module_reports(linears)
        if outputs_needed and not keep:
            self._feed(run, keep=True)
        return LayerReport(run.index, modules, time.perf_counter() - started)

    def by_statistics(self, index: int, layer: nn.Module, statistics: LayerStatistics | None) -> LayerReport:
        """Prune one layer by statistics that are there already, or by its weights alone."""
        started = time.perf_counter()
        linears = prunable_linears(layer, index, include_attention=self.recipe.include_attention)
        if self.recipe.whole_neurons:
            modules = self._remove_neurons(index, layer, linears, statistics, {})
        else:
            self.mask(index, linears, statistics)
            modules = module_reports(linears)
        return LayerReport(index, modules, time.perf_counter() - started)

    def mask(
        self, layer: int | str, linears: dict[str, nn.Linear], statistics: LayerStatistics | None
    ) -> dict[str, Tensor]:
        """Zero the lowest scores of each module, by scores of its dense weights; return the masks."""
        context = self._context(layer, _weights(linears), statistics)
        masks = {name: prune_mask(name, context) for name in linears}
        for name, linear in linears.items():
            linear.weight.masked_fill_(masks[name], 0)
        return masks

    def _context(self, layer: int | str, weights: Weights, statistics: LayerStatistics | None) -> ScoringContext:
        scored = {name: weight.float() for name, weight in weights.items()}
        return ScoringContext(layer, self.recipe, scored, statistics, self.kernels, ratio=self.ratios.get(layer))

    def _later_stages(
        self,
        run: LayerRun,
        linears: dict[str, nn.Linear],
        dense: Weights,
        statistics: LayerStatistics | None,
        masks: dict[str, Tensor],
        activation: Activation,
    ) -> None:
        """Re-fit what comes after the first stage to the inputs that the pruned stages before it hand on."""
        product = partial(gated_product, dense["gate_proj"], dense["up_proj"], activation)
        for names in self._stages[1:]:
            # down_proj also makes up for what gate and up lost: its target is the dense product, not the pruned one.
            gram = GramCollector(run.index, linears, names, product if "down_proj" in names else None)
            with gram:
                self._feed(run, keep=False)
            gram.sum_over(self.ranks)
            # A context anew for each stage: in half precision it holds copies, which no pass should have to bear.
            refit(linears, self._context(run.index, dense, statistics), masks, gram)

    def _remove_neurons(
        self,
        index: int,
        layer: nn.Module,
        linears: dict[str, nn.Linear],
        statistics: LayerStatistics | None,
        gram: Weights,
    ) -> tuple[ModuleReport, ...]:
        sizes = {name: linear.weight.numel() for name, linear in linears.items()}
        down = linears["down_proj"].weight
        kept = torch.as_tensor(kept_neurons(self._context(index, _weights(linears), statistics)), device=down.device)
        absorbed = absorb(down.float(), kept, gram["down_proj"], inverse) if gram else down[:, kept]
        remove_neurons(gated_mlp(layer, index), linears, kept, absorbed)
        return tuple(
            ModuleReport(name, sizes[name], zeros(linear), sizes[name] - linear.weight.numel())
            for name, linear in linears.items()
        )

    def _feed(self, run: LayerRun, *, keep: bool, after: Callable[[int], None] = lambda start: None) -> None:
        def batch_done(start: int) -> None:
            after(start)
            self.on_batch(run.index)

        run.feed(keep=keep, after=batch_done)


def refit(
    linears: dict[str, nn.Linear], context: ScoringContext, masks: dict[str, Tensor], gram: GramCollector
) -> None:
    """Update the modules whose inputs a Gram matrix was taken of, by their dense weights in ``context``."""
    for name, linear in linears.items():
        inputs = gram.gram.get(SHARED_INPUT.get(name, name))
        if inputs is None:
            continue
        weight = context.weights[name]
        target = weight @ gram.cross if name == "down_proj" and gram.cross is not None else None
        if context.recipe.update == "gradual":
            fitted = gradual_update(weight, partial(gradual_mask, name, context), inputs, inverse, target=target)
        else:
            # Zeros of the dense weights stay zero too: they count toward the target.
            fitted = least_squares_update(weight, masks[name] | (weight == 0), inputs, inverse, target=target)
        linear.weight.copy_(fitted)


def _weights(linears: dict[str, nn.Linear]) -> Weights:
    return {name: linear.weight for name, linear in linears.items()}


def zeros(linear: nn.Linear) -> int:
    """Number of zero weights."""
    return int((linear.weight == 0).sum())


def module_reports(linears: dict[str, nn.Linear]) -> tuple[ModuleReport, ...]:
    """Sparsity reached in each module."""
    return tuple(ModuleReport(name, linear.weight.numel(), zeros(linear)) for name, linear in linears.items())
