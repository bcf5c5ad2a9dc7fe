"""Prunes a model in memory: calibrate, score, mask and propagate, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuronrank_core import InvalidValueError, Recipe
from neuronrank_core.methods import check_recipe, needs_text, requires
from neuronrank_core.statistics.table import INPUTS, RESIDUAL, LayerStatistics
from neuronrank_torch.calibration.collector import head_statistics
from neuronrank_torch.calibration.layerwise import LayerRun, run_layers
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.experts import refuse_modes
from neuronrank_torch.model.streaming import HEAD, Unit
from neuronrank_torch.model.structure import Decoder, find_decoder, gated_mlp, prunable_linears, untied_head
from neuronrank_torch.pruning.allocation import AllocationPass
from neuronrank_torch.pruning.expert_pruner import ExpertPruner
from neuronrank_torch.pruning.layer import module_reports
from neuronrank_torch.pruning.result import LayerReport, Report
from neuronrank_torch.pruning.scope import first_pruned
from neuronrank_torch.pruning.store import LayerStore
from neuronrank_torch.text.sequences import calibration_sequences, micro_batch
from neuronrank_torch.text.sources import text_fingerprint

#: Called with (layer, steps done, steps in all); a step is one micro-batch through one layer.
Progress = Callable[[int, int, int], None]


def prune(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    texts: str | Iterable[str] = (),
    *,
    batch_size: int | None = None,
    on_progress: Progress = lambda layer, done, total: None,
    store: LayerStore | None = None,
    statistics: StatisticsFolder | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Prune a model in place.

    Parameters
    ----------
    model : transformers model
        A decoder with gated MLPs, on the device to work on. Should the run fail, layers already done stay pruned.
    tokenizer : transformers tokenizer
    recipe : Recipe
    texts : str or iterable of str
        Calibration text; not looked at by methods that need none.
    batch_size : int, optional
        Sequences in a micro-batch; by default about 2048 tokens' worth.
    on_progress : callable
        See :data:`Progress`.
    store : LayerStore, optional
        Where the layers' weights are while they are not at work; by default they stay in memory.
    statistics : StatisticsFolder, optional
        Statistics of this very model to prune by, instead of calibration text.
    ranks : Ranks
        Processes that share the text, each with the whole model and the same arguments; from
        :func:`neuronrank_torch.distributed.process_group.launched`. All end with the same pruned model.

    Returns
    -------
    Report

    Raises
    ------
    InvalidValueError
        If ``batch_size`` is below 1.
    InputError
        If the text is too short, or the recipe asks for modules that the model does not have.
    MissingStatisticsError
        If the model has no gated MLP.
    AllZeroMetricError, NonFiniteError
        If there is nothing to choose by, or a number is NaN or Inf.
    """
    started = time.perf_counter()
    if statistics is not None:
        recipe = statistics.fitted(recipe)
    check_recipe(recipe)
    run = _PruneRun(model, recipe, on_progress, store or LayerStore(), ranks)
    if batch_size is not None and batch_size < 1:
        raise InvalidValueError("batch_size", batch_size, "a whole number >= 1")
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            if statistics is not None or not needs_text(recipe):
                run.by_statistics(statistics)
                calibration = statistics.calibration() if statistics is not None else {}
            else:
                text = texts if isinstance(texts, str) else "\n\n".join(texts)
                sequences = calibration_sequences(tokenizer, recipe, text)
                calibration = {"text_sha256": text_fingerprint(text), "tokens": sequences.numel()}
                run.calibrated(sequences, batch_size or micro_batch(recipe))
    finally:
        for module, mode in training.items():
            module.training = mode
    return Report(
        recipe,
        tuple(run.reports),
        sum(p.numel() for p in model.parameters()),
        calibration,
        time.perf_counter() - started,
        (*run.notes, *(note for layer in run.reports for note in layer.notes)),
    )


def _idle(ranks: Ranks, sequences: int, batch_size: int) -> list[str]:
    """What the user should know where there are more ranks than micro-batches."""
    batches = -(-sequences // batch_size)
    if ranks.size <= batches:
        return []
    return [f"{ranks.size - batches} of {ranks.size} processes had no text: lower --batch-size or raise --nsamples"]


class _PruneRun:
    """One run over one model: what the layers' visits share."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, on_progress: Progress, store: LayerStore, ranks: Ranks
    ) -> None:
        self.model, self.recipe, self.on_progress, self.store, self.ranks = model, recipe, on_progress, store, ranks
        self.decoder: Decoder = find_decoder(model)
        refuse_modes(self.decoder.layers, recipe)
        self.head = untied_head(model) if recipe.prune_lm_head else None
        # Where a streamed model works; its layers are elsewhere now.
        self.device = next(p.device for p in model.parameters() if not p.is_meta)
        self.reports: list[LayerReport] = []
        self.first, self.notes = first_pruned(recipe, len(self.decoder.layers))
        self.pruner = ExpertPruner(recipe, TorchKernels(self.device), self._step, ranks)
        self.steps = 0

    def by_statistics(self, statistics: StatisticsFolder | None) -> None:
        """Prune by statistics that are there already, or by the weights alone."""
        layers = self.decoder.layers
        if statistics is not None:
            statistics.check_layers(len(layers))
        kinds = requires(self.recipe)

        def table(unit: Unit) -> LayerStatistics | None:
            return statistics.table(unit, kinds) if statistics is not None and kinds else None

        if statistics is not None and self.recipe.allocate != "uniform":
            self._allocate(partial(self._count, statistics))
        for index, layer in enumerate(layers):
            if not self._recalled(index):
                with self.store.resident(index):
                    pruned = index >= self.first
                    self._record(index, self.pruner.by_statistics(index, layer, table(index)) if pruned else None)
            self.on_progress(index, index + 1, len(layers))
        if self.head is not None and not self._recalled(HEAD):
            with self.store.resident(HEAD):
                self._mask(HEAD, {HEAD: self.head}, table(HEAD))
        if self.recipe.whole_neurons:
            self._shrink_config()

    def _count(self, statistics: StatisticsFolder, dense: AllocationPass) -> None:
        """Work out the allocation by statistics instead of a pass over text."""
        for index in range(self.first, len(self.decoder.layers)):
            table = statistics.table(index, {INPUTS, RESIDUAL})
            with self.store.resident(index):
                dense.count(index, prunable_linears(self.decoder.layers[index], index), table)

    def calibrated(self, sequences: Tensor, batch_size: int) -> None:
        """Collect, prune and propagate layer by layer."""
        layers = range(len(self.decoder.layers))
        if all(map(self.store.done, layers)) and not self._head_left():
            for unit in (*layers, *([] if self.head is None else [HEAD])):
                self._recalled(unit)
        else:
            self.notes += _idle(self.ranks, len(sequences), batch_size)
            share = self.ranks.share(len(sequences), batch_size)
            batches = -(-(share.stop - share.start) // batch_size)
            self.total = batches * sum(map(self._passes, layers))
            if self.recipe.allocate != "uniform":
                self.total += batches * len(self.decoder.layers) * (self.store.ratios() is None)
                self._allocate(lambda dense: self._run_layers(sequences, dense.visit, batch_size))
            hidden = self._run_layers(sequences, self._visit, batch_size)
            if self.head is not None:
                with self.store.resident(HEAD):
                    self._mask(HEAD, {HEAD: self.head}, head_statistics(self.decoder, hidden, self.device, self.ranks))
        if self.recipe.whole_neurons:
            self._shrink_config()

    def _run_layers(self, sequences: Tensor, visit: Callable[[LayerRun], None], batch_size: int) -> Tensor:
        share = self.ranks.share(len(sequences), batch_size)
        return run_layers(
            self.decoder,
            sequences[share].to(self.device),
            visit,
            batch_size=batch_size,
            first=share.start,
            resident=self.store.resident,
            room=self.store.room,
        )

    def _allocate(self, look: Callable[[AllocationPass], object]) -> None:
        """Give each layer its sparsity ratio, once ``look`` has shown the pass every dense layer."""
        ratios = self.store.ratios()
        if ratios is None:
            dense = AllocationPass(self.decoder, self.recipe, self.pruner.kernels, self.first, self._step, self.ranks)
            look(dense)
            ratios = dense.ratios()
            self.store.keep_ratios(ratios)
        self.pruner.ratios = dict(enumerate(ratios, self.first))

    def _recalled(self, unit: Unit) -> bool:
        """Whether a unit was finished before; its report is taken over."""
        if not self.store.done(unit):
            return False
        report = self.store.report(unit)
        self.reports += [] if report is None else [report]
        return True

    def _record(self, unit: Unit, report: LayerReport | None) -> None:
        module = self.decoder.layers[unit] if isinstance(unit, int) else untied_head(self.model)
        self.ranks.agree(f"layer {unit}", module.parameters())
        self.reports += [] if report is None else [report]
        self.store.keep(unit, report)

    def _head_left(self) -> bool:
        return self.head is not None and not self.store.done(HEAD)

    def _outputs_needed(self, index: int) -> bool:
        return index + 1 < len(self.decoder.layers) or self._head_left()

    def _passes(self, index: int) -> int:
        """How often layer ``index`` runs over the calibration text."""
        if index < self.first or self.store.done(index):
            return int(self._outputs_needed(index))
        return self.pruner.passes(outputs_needed=self._outputs_needed(index))

    def _visit(self, run: LayerRun) -> None:
        outputs_needed = self._outputs_needed(run.index)
        finished = self._recalled(run.index)
        if finished or run.index < self.first:
            if outputs_needed:
                run.feed(keep=True, after=lambda start: self._step(run.index))
            if not finished:
                self._record(run.index, None)
        else:
            self._record(run.index, self.pruner.visit(run, outputs_needed=outputs_needed))

    def _step(self, layer: int) -> None:
        self.steps += 1
        self.on_progress(layer, self.steps, self.total)

    def _mask(self, layer: Unit, linears: dict[str, nn.Linear], statistics: LayerStatistics | None) -> None:
        started = time.perf_counter()
        self.pruner.mask(layer, linears, statistics)
        self._record(layer, LayerReport(layer, module_reports(linears), time.perf_counter() - started))

    def _shrink_config(self) -> None:
        """State the number of neurons that is left, which is the same in every layer."""
        neurons = gated_mlp(self.decoder.layers[0], 0).down_proj.weight.shape[1]  # type: ignore[union-attr, index]
        config = self.decoder.body.config
        config.intermediate_size = neurons  # type: ignore[union-attr]
