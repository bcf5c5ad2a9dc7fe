"""Prunes a model layer by layer, with all layers or only one at a time in memory."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from neuronrank_core import InvalidValueError, Recipe
from neuronrank_core.methods import check_recipe, needs_text, requires
from neuronrank_core.selection.allocation import typical_gain
from neuronrank_core.statistics.table import INPUTS, RESIDUAL, LayerStatistics
from neuronrank_torch.calibration.collector import head_statistics
from neuronrank_torch.calibration.dense_stream import DenseStream
from neuronrank_torch.calibration.layerwise import LayerRun, Others, run_layers
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.blocks import Block
from neuronrank_torch.model.eval_mode import eval_mode
from neuronrank_torch.model.streaming import HEAD, Unit
from neuronrank_torch.model.structure import find_decoder, untied_head
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.allocation import AllocationPass
from neuronrank_torch.pruning.layer import LayerPlan, prune_by_statistics, prune_layer
from neuronrank_torch.pruning.options import OptionPass
from neuronrank_torch.pruning.result import Calibration, LayerReport, Report
from neuronrank_torch.pruning.scope import pruned_layers, refuse_modes
from neuronrank_torch.pruning.sparsity_types import sparsity_type_of
from neuronrank_torch.pruning.store import InMemory, LayerStore
from neuronrank_torch.pruning.whole_layers import remove_layers
from neuronrank_torch.text.sequences import calibration_sequences, micro_batch
from neuronrank_torch.text.sources import text_fingerprint


def prune(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    texts: str | Iterable[str] = (),
    *,
    batch_size: int | None = None,
    progress: Progress = silent,
    store: LayerStore | None = None,
    statistics: StatisticsFolder | None = None,
    ranks: Ranks = ALONE,
    after: Callable[[LayerRun], None] | None = None,
) -> Report:
    """Prune a model in place.

    Parameters
    ----------
    model : transformers model
        A decoder with gated or plain MLPs, on the device to use. If the run fails, finished layers remain pruned.
    tokenizer : transformers tokenizer
    recipe : Recipe
    texts : str or iterable of str
        Calibration text; not used by methods that need none, unless there is ``after``.
    batch_size : int, optional
        Sequences per micro-batch; by default as many as make about 2048 tokens.
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`; a step is one micro-batch through one layer.
    store : LayerStore, optional
        Storage of the weights of layers that are not being processed; by default they stay in memory.
    statistics : StatisticsFolder, optional
        Statistics of this model, used instead of calibration text.
    ranks : Ranks
        Processes that share the text, each with the whole model and the same arguments; from
        :func:`neuronrank_torch.distributed.process_group.launched`. All produce the same pruned model.
    after : callable, optional
        Called with each layer when it is finished, while its weights are in memory; not if statistics are used.

    Returns
    -------
    Report

    Raises
    ------
    InvalidValueError
        If ``batch_size`` is below 1.
    InputError
        If the text is too short, or the recipe includes modules that the model does not have.
    MissingStatisticsError
        If the model has no MLP in a known layout.
    AllZeroMetricError, NonFiniteError
        If all scores are zero, or a value is NaN or Inf.
    """
    started, store = time.perf_counter(), store or InMemory()
    if statistics is not None:
        recipe = statistics.fitted(recipe)
    check_recipe(recipe)
    if recipe.removes_layers:
        ranks.require_one(f"--sparsity_type {recipe.sparsity_type}")
        text = texts if isinstance(texts, str) else "\n\n".join(texts)
        with eval_mode(model), torch.no_grad():
            return remove_layers(
                model, tokenizer, recipe, text, batch_size=batch_size, progress=progress, measured=store.measured
            )
    run = _PruneRun(model, recipe, progress, store, ranks, after)
    if batch_size is not None and batch_size < 1:
        raise InvalidValueError("batch_size", batch_size, "a whole number >= 1")
    with eval_mode(model), torch.no_grad():
        if statistics is not None or not (needs_text(recipe) or after):
            run.by_statistics(statistics)
            calibration = Calibration(**(statistics.calibration() if statistics is not None else {}))
        else:
            text = texts if isinstance(texts, str) else "\n\n".join(texts)
            sequences = calibration_sequences(tokenizer, recipe, text)
            calibration = Calibration(sequences.numel(), text_fingerprint(text))
            run.calibrated(sequences, batch_size or micro_batch(recipe))
    return Report.of(
        run.recipe,
        run.reports,
        sum(p.numel() for p in model.parameters()),
        calibration,
        round(time.perf_counter() - started, 3),
        (*run.notes, *(note for layer in run.reports for note in layer.notes)),
    )


class _PruneRun:
    """State of one run over one model: settings for the whole model, then the layers in order."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        progress: Progress,
        store: LayerStore,
        ranks: Ranks,
        after: Callable[[LayerRun], None] | None,
    ) -> None:
        self.progress, self.store, self.ranks, self.after = progress, store, ranks, after
        self.model, self.decoder = model, find_decoder(model)
        self.recipe = self.decoder.measured(recipe)
        self.asked, self.kind = recipe, sparsity_type_of(recipe)
        resumed = [layer for layer in self.decoder.layers if store.done(layer.index)]
        for layer in resumed:
            self.kind.resume(layer)
        if not resumed:  # Finished layers may have fewer neurons.
            refuse_modes(model, self.decoder, recipe)
        #: What the scores of all layers decide between, before the first layer is pruned.
        self.options = self.kind.options(model, self.decoder, self.recipe)
        if len(self.options) == 1:
            [self.recipe] = self.options
        self.head = untied_head(model) if recipe.prune_lm_head else None
        # The layers of a streamed model are on the meta device until they are loaded.
        self.device = next(p.device for p in model.parameters() if not p.is_meta)
        self.kernels = TorchKernels(self.device)
        self.reports: list[LayerReport] = []
        self.depth = len(self.decoder.layers)
        #: Module of each unit, in the order in which they are pruned.
        self.modules: dict[Unit, nn.Module] = {layer.index: layer.module for layer in self.decoder.layers}
        if self.head is not None:
            self.modules[HEAD] = self.head.module
        self.layers, self.notes = pruned_layers(self.decoder, recipe)
        self.pruned = {layer.index for layer in self.layers}
        #: Sparsity ratios by layer, if allocated between layers.
        self.ratios: dict[int | str, float] = {}
        self.what, self.steps, self.total = "", 0, 0
        self.others: Others = None

    def plan(self, unit: Unit) -> LayerPlan:
        """The plan for a layer or the head."""
        return LayerPlan(self.recipe, self.kernels, self.ratios.get(unit), first=unit == self.layers[0].index)

    def by_statistics(self, statistics: StatisticsFolder | None) -> None:
        """Prune by existing statistics, or by the weights alone."""
        if statistics is not None:
            statistics.check_layers(self.depth)
            if self.recipe.differs_by_layer:
                self._allocate(lambda dense: self._count(statistics, dense))
        self._decide(self._look_at_weights)
        for layer in self.decoder.layers:
            if layer.index not in self.pruned:
                self._leave(layer.index)
            else:
                self._prune_by_statistics(layer.index, self.kind.blocks(layer, self.recipe), statistics)
            self.progress(f"pruning layer {layer.index + 1} of {self.depth}", layer.index + 1, self.depth, "layers")
        if self.head is not None:
            self._prune_by_statistics(HEAD, [self.head], statistics)
        self._change_config()

    def _prune_by_statistics(self, unit: Unit, blocks: Sequence[Block], statistics: StatisticsFolder | None) -> None:
        if self._recalled(unit):
            return
        kinds = requires(self.recipe)
        table = statistics.table(unit, kinds) if statistics is not None and kinds else None
        self._prune_by_table(unit, blocks, table)

    def _prune_by_table(self, unit: Unit, blocks: Sequence[Block], table: LayerStatistics | None) -> None:
        with self.store.resident(unit):
            self._record(unit, prune_by_statistics(unit, blocks, [table] * len(blocks), self.plan(unit)))

    def _leave(self, unit: Unit) -> None:
        if not self._recalled(unit):
            with self.store.resident(unit):
                self._record(unit, None)

    def _count(self, statistics: StatisticsFolder, dense: AllocationPass) -> None:
        """Compute the allocation from statistics instead of a pass over text."""
        for layer in self.layers:
            table = statistics.table(layer.index, {INPUTS, RESIDUAL})
            with self.store.resident(layer.index):
                gain = typical_gain(table.require("error_gain", layer.index), layer.index)
                dense.count(layer, [table], table.require("residual_norm", layer.index), [gain])

    def calibrated(self, sequences: Tensor, batch_size: int) -> None:
        """Collect, prune and propagate layer by layer."""
        if all(map(self.store.done, self.modules)):
            for unit in self.modules:
                self._recalled(unit)
        else:
            self.notes += _idle(self.ranks, len(sequences), batch_size)
            if type(self.store) is InMemory:  # What cannot be run like this is refused before the model is changed.
                few = sequences[: min(2, batch_size), :16].to(self.device)
                run_layers(self.decoder, few, lambda run: run.feed(keep=True), batch_size=batch_size)
            self._count_steps(len(sequences), batch_size)
            if self.recipe.differs_by_layer:
                self._allocate(lambda dense: self._run_layers(sequences, dense.visit, batch_size, "measuring"))
            self._decide(lambda dense: self._run_layers(sequences, dense.visit, batch_size, "measuring"))
            hidden = self._run_layers(sequences, self._visit, batch_size, "calibrating")
            if self.head is not None:
                own = sequences[self.ranks.share(len(sequences), batch_size)].to(self.device)
                table = head_statistics(self.model, self.decoder, hidden, own, others=self.others, ranks=self.ranks)
                self._prune_by_table(HEAD, [self.head], table)
        self._change_config()

    def _change_config(self) -> None:
        if self.recipe.sparsity_type != self.asked.sparsity_type:
            self.notes += self.kind.notes(self.decoder, self.recipe)
        self.kind.change_config(self.decoder)

    def _count_steps(self, sequences: int, batch_size: int) -> None:
        """Count all steps, and those done by an earlier process; a finished layer only propagates the text."""
        share = self.ranks.share(sequences, batch_size)
        batches = -(-(share.stop - share.start) // batch_size)
        layers = range(self.depth)
        self.total = batches * sum(self._passes(index, done=False) for index in layers)
        self.steps = self.total - batches * sum(self._passes(index, done=self.store.done(index)) for index in layers)
        if self.recipe.differs_by_layer:
            self.total += batches * self.depth
            self.steps += batches * self.depth * (self.store.ratios() is not None)
        self.total += batches * self.depth * (len(self.options) > 1)

    def _passes(self, index: int, *, done: bool) -> int:
        """Number of passes of the calibration text through layer ``index``."""
        if index not in self.pruned or done:
            return self._outputs_needed(index) + (self.recipe.updates_toward_model and index >= self.layers[0].index)
        return self.plan(index).passes(self.decoder.layers[index], outputs_needed=self._outputs_needed(index))

    def _run_layers(self, sequences: Tensor, visit: Callable[[LayerRun], None], batch_size: int, what: str) -> Tensor:
        self.what = what
        share = self.ranks.share(len(sequences), batch_size)
        return run_layers(
            self.decoder,
            sequences[share].to(self.device),
            visit,
            batch_size=batch_size,
            first=share.start,
            resident=self.store.resident,
            room=self.store.room,
            on_batch=self._step,
        )

    def _step(self, index: int) -> None:
        self.steps += 1
        self.progress(f"{self.what} layer {index + 1} of {self.depth}", self.steps, self.total, "micro-batches")

    def _allocate(self, look: Callable[[AllocationPass], object]) -> None:
        """Set the sparsity ratio of each layer; ``look`` feeds every dense layer to the allocation pass."""
        ratios = self.store.ratios()
        if ratios is None:
            dense = AllocationPass(self.layers, self.recipe, self.kernels, self.ranks)
            look(dense)
            ratios = dense.ratios()
            self.store.keep_ratios(ratios)
        self.ratios = {layer.index: ratio for layer, ratio in zip(self.layers, ratios, strict=True)}

    def _decide(self, look: Callable[[OptionPass], object]) -> None:
        """Settle on one of the options; ``look`` shows every dense layer to a pass that compares them."""
        if len(self.options) > 1:
            dense = OptionPass(self.options, self.kernels, self.ranks)
            look(dense)
            self.recipe = dense.best()

    def _look_at_weights(self, dense: OptionPass) -> None:
        for layer in self.layers:
            with self.store.resident(layer.index):
                dense.compare(layer, [None])

    def _visit(self, run: LayerRun) -> None:
        """Prune one layer; if it is finished or not to be pruned, only run the text through it."""
        self._prune_or_feed(run)
        self.others = run.others
        if self.after is not None:
            self.after(run)

    def _prune_or_feed(self, run: LayerRun) -> None:
        needed = self._outputs_needed(run.index)
        if not self.store.done(run.index) and run.index in self.pruned:
            self._record(run.index, prune_layer(run, self.plan(run.index), self.ranks, outputs_needed=needed))
            return
        if self.recipe.updates_toward_model:
            self._advance(run)
        if needed:
            run.feed(keep=True)
        if not self._recalled(run.index):
            self._record(run.index, None)

    def _advance(self, run: LayerRun) -> None:
        """Run the dense model's hidden states through a layer that is finished or not to be pruned."""
        first = self.layers[0].index
        if run.index < first:
            return
        stream = DenseStream(run, first=run.index == first)
        with self.store.original(run.index) if self.store.done(run.index) else nullcontext():
            stream.advance()

    def _outputs_needed(self, index: int) -> bool:
        return index + 1 < self.depth or self._head_left()

    def _head_left(self) -> bool:
        return self.head is not None and not self.store.done(HEAD)

    def _recalled(self, unit: Unit) -> bool:
        """Whether a unit was finished by an earlier process; if so, reuse its report."""
        if not self.store.done(unit):
            return False
        report = self.store.report(unit)
        self.reports += [] if report is None else [report]
        return True

    def _record(self, unit: Unit, report: LayerReport | None) -> None:
        self.ranks.agree(f"layer {unit}", self.modules[unit].parameters())
        self.reports += [] if report is None else [report]
        self.store.keep(unit, report)


def _idle(ranks: Ranks, sequences: int, batch_size: int) -> list[str]:
    """Note for the user if there are more ranks than micro-batches."""
    batches = -(-sequences // batch_size)
    if ranks.size <= batches:
        return []
    return [f"{ranks.size - batches} of {ranks.size} processes had no text: lower --batch-size or raise --nsamples"]
