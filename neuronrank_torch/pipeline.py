"""Prunes a model in memory: calibrate, score, mask and propagate, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from neuronrank_core import MissingStatisticsError, NeuronRankError, Recipe, ScoringContext, prune_mask
from neuronrank_core.statistics import LayerStatistics
from neuronrank_torch import corpus
from neuronrank_torch.architecture import Decoder, find_decoder, gated_mlp, prunable_linears, untied_head
from neuronrank_torch.collector import LayerCollector
from neuronrank_torch.executor import LayerRun, run_layers
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.report import LayerReport, ModuleReport, Report

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

    Returns
    -------
    Report

    Raises
    ------
    InputError
        If the text is too short, or the recipe asks for modules that the model does not have.
    MissingStatisticsError
        If the model has no gated MLP.
    AllZeroMetricError, NonFiniteError
        If there is nothing to choose by, or a number is NaN or Inf.
    """
    started = time.perf_counter()
    run = _PruneRun(model, recipe, on_progress)
    calibration: dict[str, Any] = {}
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if recipe.requires:
                text = texts if isinstance(texts, str) else "\n\n".join(texts)
                sequences = calibration_sequences(tokenizer, recipe, text)
                calibration = {"text_sha256": corpus.text_fingerprint(text), "tokens": sequences.numel()}
                run.calibrated(sequences, batch_size or max(1, 2048 // recipe.seqlen))
            else:
                run.uncalibrated()
    finally:
        model.train(training)
    return Report(
        recipe,
        tuple(run.reports),
        sum(p.numel() for p in model.parameters()),
        calibration,
        time.perf_counter() - started,
        tuple(run.notes),
    )


def calibration_sequences(tokenizer: Any, recipe: Recipe, text: str) -> Tensor:
    """Draw the recipe's calibration sequences, int64, shape (nsamples, seqlen)."""
    drawn = corpus.draw_sequences(
        corpus.tokenize(tokenizer, text),
        nsamples=recipe.nsamples,
        seqlen=recipe.seqlen,
        seed=recipe.seed,
        bos=corpus.bos_token(tokenizer),
        bos_mode=recipe.bos,
    )
    return torch.as_tensor(drawn)


def first_pruned(recipe: Recipe, layers: int) -> tuple[int, list[str]]:
    """First layer that the recipe prunes in a model of so many layers, and what the user should know."""
    last = recipe.pruning_last
    if last is not None and last > layers:
        return 0, [f"--pruning_last is {last} but the model has {layers} layers: all are pruned"]
    return 0 if last is None else layers - last, []


class _PruneRun:
    """One run over one model: what the layers' visits share."""

    def __init__(self, model: nn.Module, recipe: Recipe, on_progress: Progress) -> None:
        self.model, self.recipe, self.on_progress = model, recipe, on_progress
        self.decoder: Decoder = find_decoder(model)
        self.head = untied_head(model) if recipe.prune_lm_head else None
        self.device = next(model.parameters()).device
        self.kernels = TorchKernels(self.device)
        self.reports: list[LayerReport] = []
        self.first, self.notes = first_pruned(recipe, len(self.decoder.layers))
        self.steps = 0

    def uncalibrated(self) -> None:
        """Prune by the weights alone."""
        layers = self.decoder.layers
        for index in range(self.first, len(layers)):
            self._prune(index, self._linears(index), None, time.perf_counter())
            self.on_progress(index, index + 1, len(layers))
        if self.head is not None:
            self._prune("lm_head", {"lm_head": self.head}, None, time.perf_counter())

    def calibrated(self, sequences: Tensor, batch_size: int) -> None:
        """Collect, prune and propagate layer by layer."""
        self.batch_size, self.samples = batch_size, len(sequences)
        batches = -(-len(sequences) // batch_size)
        self.total = batches * sum(self._passes(index) for index in range(len(self.decoder.layers)))
        hidden = run_layers(self.decoder, sequences.to(self.device), self._visit, batch_size=batch_size)
        if self.head is not None:
            self._prune_head(hidden)

    def _linears(self, index: int) -> dict[str, nn.Linear]:
        return prunable_linears(self.decoder.layers[index], index, include_attention=self.recipe.include_attention)

    def _outputs_needed(self, index: int) -> bool:
        return index + 1 < len(self.decoder.layers) or self.head is not None

    def _passes(self, index: int) -> int:
        """How often layer ``index`` runs over the calibration text."""
        if index < self.first:
            return 1
        return 2 if self.recipe.propagate == "pruned" and self._outputs_needed(index) else 1

    def _visit(self, run: LayerRun) -> None:
        started = time.perf_counter()
        if run.index < self.first:
            run.feed(keep=True, after=lambda first: self._step(run.index))
            return
        linears = self._linears(run.index)
        activation = gated_mlp(run.layer, run.index).act_fn
        twice = self._passes(run.index) == 2
        with LayerCollector(run.index, linears, activation, self.recipe) as collector:  # type: ignore[arg-type]

            def after(first: int) -> None:
                collector.add_documents(first, run.hidden.shape[1])
                self._step(run.index)

            run.feed(keep=not twice, after=after)
        self._prune(run.index, linears, collector.statistics(), started)
        if twice:
            run.feed(keep=True, after=lambda first: self._step(run.index))
            self.reports[-1] = LayerReport(run.index, self.reports[-1].modules, time.perf_counter() - started)

    def _step(self, layer: int) -> None:
        self.steps += 1
        self.on_progress(layer, self.steps, self.total)

    def _prune(
        self,
        layer: int | str,
        linears: dict[str, nn.Linear],
        statistics: LayerStatistics | None,
        started: float,
    ) -> None:
        """Mask the modules of a layer by scores of its dense weights, and report."""
        weights = {name: linear.weight.float() for name, linear in linears.items()}
        context = ScoringContext(layer, self.recipe, weights, statistics, self.kernels)
        masks = {name: prune_mask(name, context) for name in linears}
        modules = []
        for name, linear in linears.items():
            linear.weight.masked_fill_(masks[name], 0)
            modules.append(ModuleReport(name, linear.weight.numel(), int((linear.weight == 0).sum())))
        self.reports.append(LayerReport(layer, tuple(modules), time.perf_counter() - started))

    def _prune_head(self, hidden: Tensor) -> None:
        """Prune the head by the normalised hidden states that enter it."""
        started = time.perf_counter()
        norm = getattr(self.decoder.body, "norm", None)
        if self.head is None or not isinstance(norm, nn.Module):
            raise NeuronRankError("the decoder has no final norm", hint="leave out --nr-prune-lm-head")
        columns = torch.stack([norm(sequence).float().square().mean(0) for sequence in hidden])
        if not columns.isfinite().all():
            raise MissingStatisticsError("lm_head", "NaN or Inf in its input")
        table = LayerStatistics.from_columns(
            {
                "document": torch.arange(len(hidden)).numpy(),
                "tokens": torch.full((len(hidden),), hidden.shape[1]).numpy(),
                "input_mean_square.lm_head": columns.cpu().numpy(),
            }
        )
        self._prune("lm_head", {"lm_head": self.head}, table, started)
