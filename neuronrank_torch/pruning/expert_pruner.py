"""Prunes a decoder layer whose MLP is a mixture of experts: each by its own tokens, or by magnitude where they are few.

Everything else is as for a layer with one MLP: an expert's gate, up and down are modules like any others.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property

from torch import nn

from neuronrank_core import LayerStatistics, Recipe
from neuronrank_core.methods import METHODS, mode, requires
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.expert_collector import ExpertCollector, where
from neuronrank_torch.calibration.layerwise import LayerRun
from neuronrank_torch.model.experts import Experts, find_experts, report_name
from neuronrank_torch.model.structure import attention_linears
from neuronrank_torch.pruning.layer import LayerPruner, module_reports
from neuronrank_torch.pruning.result import LayerReport, ModuleReport

#: An expert that saw fewer calibration tokens is pruned by magnitude. Wanda was measured to be worse than magnitude
#: with 2 tokens, and far better with 8: the figures are in docs/moe.md.
MINIMUM_TOKENS = 8
Statistics = LayerStatistics | None


class ExpertPruner(LayerPruner):
    """Prunes layers with experts and, as its base does, layers without."""

    @cached_property
    def _by_magnitude(self) -> LayerPruner:
        return LayerPruner(replace(self.recipe, method="magnitude"), self.kernels, self.on_batch)

    @cached_property
    def _attention(self) -> LayerPruner:
        method = METHODS[self.recipe.method].beyond_mlp
        return LayerPruner(replace(self.recipe, method=method), self.kernels, self.on_batch)

    def visit(self, run: LayerRun, *, outputs_needed: bool) -> LayerReport:
        """Calibrate, prune and propagate one layer."""
        experts = find_experts(run.layer, run.index)
        if experts is None:
            return super().visit(run, outputs_needed=outputs_needed)
        started = time.perf_counter()
        keep = self.recipe.propagate == "dense"
        report = self._prune(run.index, run.layer, experts, *self._calibrate(run, experts, keep=keep))
        if outputs_needed and not keep:
            self._feed(run, keep=True)
        return replace(report, seconds=time.perf_counter() - started)

    def by_statistics(self, index: int, layer: nn.Module, statistics: Statistics) -> LayerReport:
        """Prune one layer by statistics that are there already (never of experts), or by its weights alone."""
        experts = find_experts(layer, index)
        if experts is None:
            return super().by_statistics(index, layer, statistics)
        started = time.perf_counter()
        report = self._prune(index, layer, experts, [None] * len(experts), None)
        return replace(report, seconds=time.perf_counter() - started)

    def _calibrate(self, run: LayerRun, experts: Experts, *, keep: bool) -> tuple[list[Statistics], Statistics]:
        """Tables of each expert and of attention."""
        attention = self._attention_of(run.layer, run.index)
        # Collects nothing where there is no attention to prune.
        beyond = LayerCollector(run.index, attention, experts.activation, self._attention.recipe)
        collector = ExpertCollector(run.index, experts, self.recipe)

        def batch_done(start: int) -> None:
            collector.add_documents(start, run.hidden.shape[1])
            if attention:
                beyond.add_documents(start, run.hidden.shape[1])

        with collector, beyond:
            self._feed(run, keep=keep, after=batch_done)
        tables = [collector.statistics(expert, self.ranks) for expert in range(len(experts))]
        return tables, beyond.statistics(self.ranks) if attention else None

    def _attention_of(self, layer: nn.Module, index: int) -> dict[str, nn.Linear]:
        return attention_linears(layer, index) if self.recipe.include_attention else {}

    def _prune(
        self, index: int, layer: nn.Module, experts: Experts, tables: list[Statistics], beyond: Statistics
    ) -> LayerReport:
        """Mask every expert by its own table, and attention by its own."""
        modules: list[ModuleReport] = []
        starved: list[str] = []
        for expert, table in enumerate(tables):
            linears = experts.linears(expert)
            few = too_few(table, self.recipe)
            (self._by_magnitude if few else self).mask(where(index, expert), linears, table)
            modules += [replace(m, name=report_name(expert, m.name)) for m in module_reports(linears)]
            if few:
                starved.append(f"{expert} ({0 if table is None else table.tokens.sum()})")
        attention = self._attention_of(layer, index)
        if attention:
            self._attention.mask(index, attention, beyond)
            modules += module_reports(attention)
        return LayerReport(index, tuple(modules), 0.0, _notes(index, starved))


def _notes(index: int, starved: list[str]) -> tuple[str, ...]:
    """What the user should know of experts that were pruned by magnitude."""
    if not starved:
        return ()
    return (
        f"layer {index}: too few calibration tokens (in brackets) reached these experts, which are pruned by magnitude:"
        f" {', '.join(starved)}",
    )


def too_few(table: Statistics, recipe: Recipe) -> bool:
    """Whether an expert's tokens are too few for the recipe's method; never for one that looks at weights alone."""
    if not requires(recipe):
        return False
    if table is None or table.tokens.sum() < MINIMUM_TOKENS:
        return True
    return mode(recipe) == "topic" and table.sample is not None and len(table.sample) < recipe.tfidf_k
