"""Removal of whole decoder layers from a model in memory, which leaves a model with an unchanged architecture.

``layers``: one after another, each time the one without which predictions on held-out calibration text are closest to
those of the dense model, after re-fitting. ``layers-by-influence``: those with the lowest block influence, in that
order, measured once.

Re-fitting follows Shopkhoev et al. 2025, "ReplaceMe: network simplification via depth pruning and transformer block
linearization", arXiv 2505.02819: the linear map of the MLP's output before the removed layer that best replaces the
layer is multiplied into the MLP's ``down_proj``.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuronrank_core import InputError, NonFiniteError, Recipe
from neuronrank_core.effort import HELD_OUT
from neuronrank_core.selection.layers import removed_layers
from neuronrank_core.update.least_squares import linear_map
from neuronrank_torch.calibration.error_gain import shifted
from neuronrank_torch.calibration.layerwise import split_output
from neuronrank_torch.kernels import inverse, kl_divergence, layer_signal
from neuronrank_torch.model.depth import check_all_run, check_cache, check_depth, keep_layers, with_layers
from neuronrank_torch.model.structure import Decoder, Layer, find_decoder
from neuronrank_torch.progress import Progress
from neuronrank_torch.pruning.result import WHOLE, Calibration, LayerReport, ModuleReport, Report
from neuronrank_torch.pruning.store import Measured
from neuronrank_torch.text.sequences import calibration_sequences, micro_batch
from neuronrank_torch.text.sources import text_fingerprint

#: Whether a model with fewer layers is faster, and why.
FEWER_LAYERS = "yes: the removed layers are neither computed nor stored"
#: Most tokens that are held out: the dense model's probabilities of the whole vocabulary at each are in memory.
HELD_OUT_TOKENS = 2048


@dataclass
class LayerSums:
    """Sums over the calibration tokens at one layer.

    Parameters
    ----------
    signal : float
        Sum of the signal of the layer.
    tokens : int
    gram : Tensor, shape (hidden_size, hidden_size)
        ``M' M``, where M are the outputs of the MLP before the layer; only for an update.
    cross : Tensor, shape (hidden_size, hidden_size)
        ``Y' M``, where Y is what the map of M has to add to the residual stream.
    """

    signal: float = 0.0
    tokens: int = 0
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0


def held_out(sequences: int, seqlen: int) -> int:
    """Number of the calibration sequences that are held out, at the end."""
    return min(math.ceil(HELD_OUT * sequences), max(1, HELD_OUT_TOKENS // seqlen))


def check_number(sequences: Tensor) -> None:
    """Refuse a number of sequences of which none can be held out; raises InputError."""
    if len(sequences) < 2:
        raise InputError("removing layers needs at least two sequences", hint="raise --nsamples")


def check_whole_layers(model: Any, decoder: Decoder, recipe: Recipe) -> None:
    """Refuse a model without the number of layers that the recipe removes; raises InputError."""
    depth = len(decoder.layers)
    check_depth(model, decoder, range(depth - removed_layers(depth, recipe)))


def whole_layer(layer: Layer, *, removed: bool = False, zeros: int = 0, zeros_before: int = 0) -> LayerReport:
    """The report of a layer that stays or goes as a whole."""
    size = sum(p.numel() for p in layer.module.parameters())
    return LayerReport(layer.index, {WHOLE: ModuleReport(size, zeros, size * removed, zeros_before)})


def zeros_of(layer: Layer) -> int:
    """Number of zeros in a layer that is in memory."""
    return sum(int((p == 0).sum()) for p in layer.module.parameters())


class LayerRemoval:
    """Removes layers of a model in memory.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    decoder : Decoder
    recipe : Recipe
    sequences : Tensor, shape (sequences, seqlen)
        Calibration text; its last part is held out.
    batch_size : int
    progress : callable
    measured : callable
        Keeps the measurements of an interrupted run.
    """

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        recipe: Recipe,
        sequences: Tensor,
        batch_size: int,
        progress: Progress,
        measured: Measured,
    ) -> None:
        check_number(sequences)
        self.model, self.decoder, self.recipe = model, decoder, recipe
        self.progress, self.measured = progress, measured
        held = held_out(*sequences.shape)
        self.text, self.held_out = (
            torch.split(sequences[:-held], batch_size),
            torch.split(sequences[-held:], batch_size),
        )
        self.kept = list(range(len(decoder.layers)))
        self.goes = removed_layers(len(self.kept), recipe)
        self.foldable = {layer.index for layer in decoder.layers if recipe.update != "none" and self._adds_mlp(layer)}
        self.notes: list[str] = []

    def run(self) -> list[LayerReport]:
        """Remove the layers, and return the report of every layer.

        If that fails, the layers that were removed by then are gone, since those before them stand in for them.
        """
        try:
            return self._run()
        finally:
            if len(self.kept) < len(self.decoder.layers):
                keep_layers(self.decoder, self.kept)

    def _run(self) -> list[LayerReport]:
        check_all_run(self.model, self.decoder, self.held_out[0][:1, :2])
        dense = [self._log_probabilities(batch) for batch in self.held_out]
        before = {layer.index: zeros_of(layer) for layer in self.decoder.layers}
        ranked = self._by_influence() if self.recipe.sparsity_type == "layers-by-influence" else []
        gone: dict[int, tuple[float, float]] = {}
        while len(gone) < self.goes:
            started = time.perf_counter()
            sums = self._sums() if self.foldable else {}
            if ranked:
                best = self._first_allowed(index for index in ranked if index in self.kept)
                cost = self._divergence(best, sums, dense)
            else:
                costs = {}
                for done, index in enumerate(self.kept):
                    stage = f"removing layer {len(gone) + 1} of {self.goes}"
                    self.progress(stage, done, len(self.kept), "candidates")
                    costs[index] = self._measured_divergence([*gone, index], sums, dense)
                best = self._first_allowed(sorted(costs, key=lambda index: costs[index]))
                cost = costs[best]
            fitted = self._fit(best, sums)
            if fitted is not None:
                self._before(best).mlp.projections["down_proj"].store(fitted)
            elif self.recipe.update != "none":
                self.notes.append(f"layer {best} was removed without an update: {self._why_not(best)}")
            self.kept.remove(best)
            gone[best] = cost, round(time.perf_counter() - started, 3)
        order = ", ".join(f"{index} ({cost:.4g})" for index, (cost, _) in gone.items())
        self.notes.insert(0, f"layers removed, in this order, and the KL divergence on held-out text then: {order}")
        reports = []
        for layer in self.decoder.layers:
            removed = layer.index in gone
            counts = {"zeros": 0 if removed else zeros_of(layer), "zeros_before": before[layer.index]}
            report = whole_layer(layer, removed=removed, **counts)
            reports.append(replace(report, seconds=gone[layer.index][1] if removed else 0.0))
        return reports

    def _first_allowed(self, order: Iterable[int]) -> int:
        """The first layer without which the model's class would build the same model, and could generate text.

        Raises
        ------
        InputError
            If there is none.
        """
        refused: InputError | None = None
        for index in order:
            kept = [i for i in self.kept if i != index]
            try:
                check_depth(self.model, self.decoder, kept)
                check_cache(self.model, self.decoder, kept)
            except InputError as error:
                refused = refused or error
            else:
                return index
        assert refused is not None
        raise refused

    def _before(self, index: int) -> Layer:
        return self.decoder.layers[self.kept[self.kept.index(index) - 1]]

    def _why_not(self, index: int) -> str:
        if index == self.kept[0]:
            return "no layer is before it"
        return f"layer {self._before(index).index} does not add the output of its MLP to its input as it is"

    @torch.no_grad()
    def _log_probabilities(self, batch: Tensor) -> Tensor:
        logits = self.model(input_ids=batch, use_cache=False).logits
        found: Tensor = logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
        return found

    def _divergence(self, index: int, sums: dict[int, LayerSums], dense: Sequence[Tensor]) -> float:
        """KL divergence from the dense model if a layer is removed too, after re-fitting."""
        fitted, down = self._fit(index, sums), None
        if fitted is not None:
            down = self._before(index).mlp.projections["down_proj"]
            own = down.with_bias(down.weight).clone()
            down.store(fitted)
        try:
            with with_layers(self.decoder, [i for i in self.kept if i != index]):
                found = [
                    kl_divergence(log_p, self._log_probabilities(batch)).double().sum().item()
                    for log_p, batch in zip(dense, self.held_out, strict=True)
                ]
        finally:
            if down is not None:
                down.store(own)
        if not math.isfinite(math.fsum(found)):
            raise NonFiniteError(f"NaN or Inf in the predictions without layer {index}", hint="try --dtype float32")
        return math.fsum(found) / sum(len(log_p) for log_p in dense)

    def _measured_divergence(self, gone: Sequence[int], sums: dict[int, LayerSums], dense: Sequence[Tensor]) -> float:
        """The same for the last of these layers; an earlier process may have measured it."""
        name = f"without layers {', '.join(map(str, gone))}"
        found = self.measured(name, lambda: {"kl": self._divergence(gone[-1], sums, dense)})
        return float((found or {})["kl"])

    def _fit(self, index: int, sums: dict[int, LayerSums]) -> Tensor | None:
        """``down_proj`` of the layer before, with its bias, that replaces a layer too; None if it cannot."""
        if index == self.kept[0] or self._before(index).index not in self.foldable:
            return None
        down, own = self._before(index).mlp.projections["down_proj"], sums[index]
        eye = torch.eye(down.weight.shape[0], device=down.weight.device)
        folded: Tensor = linear_map(eye, own.gram, own.cross, inverse)
        return (folded @ down.with_bias(down.weight).float()).to(down.weight.dtype)

    def _by_influence(self) -> list[int]:
        sums = self._sums()
        for index, own in sums.items():
            if not math.isfinite(own.signal):
                raise NonFiniteError(f"NaN or Inf in the hidden states at layer {index}", hint="try --dtype float32")
        return sorted(sums, key=lambda index: sums[index].signal / sums[index].tokens)

    @torch.no_grad()
    def _sums(self) -> dict[int, LayerSums]:
        """Run the text once through the current layers."""
        sums = {index: LayerSums() for index in self.kept}
        outputs: dict[int, Tensor] = {}
        hooks = []

        def see_mlp(index: int, output: Tensor) -> None:
            outputs[index] = output.flatten(0, -2).float()

        def see_layer(index: int, before: Tensor, after: Tensor) -> None:
            x, y, own = before.flatten(0, -2).float(), after.flatten(0, -2).float(), sums[index]
            own.signal += layer_signal(x, y).double().sum().item()
            own.tokens += len(x)
            place = self.kept.index(index)
            if place and self.kept[place - 1] in self.foldable:
                m = outputs.pop(self.kept[place - 1])
                own.gram = own.gram + m.T @ m
                own.cross = own.cross + (y - (x - m)).T @ m

        for index in self.kept:
            layer = self.decoder.layers[index]
            if index in self.foldable:
                down = layer.mlp.projections["down_proj"].module
                hooks.append(down.register_forward_hook(lambda _, args, out, i=index: see_mlp(i, out)))
            hooks.append(
                layer.module.register_forward_hook(
                    lambda _, args, out, i=index: see_layer(i, args[0], split_output(out)[0])
                )
            )
        try:
            with with_layers(self.decoder, self.kept):
                for done, batch in enumerate(self.text):
                    self.progress("measuring layers", done, len(self.text), "micro-batches")
                    self.model(input_ids=batch, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return sums

    @torch.no_grad()
    def _adds_mlp(self, layer: Layer) -> bool:
        """Whether what ``down_proj`` puts out is added to the residual stream as it is, without a norm or a factor."""
        if len(layer.mlps) != 1 or layer.experts is not None:
            return False
        seen: list[Tensor] = []

        def output() -> Tensor:
            self.model(input_ids=self.held_out[0][:1, :8], use_cache=False)
            return seen.pop()

        with layer.module.register_forward_hook(lambda _, args, out: seen.append(split_output(out)[0])):
            change, shift = shifted(output, layer.output_of(layer.mlp))
        error = (change - shift).norm(dim=-1) / shift.norm()
        return bool(error.median() < 0.1)


def remove_layers(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    text: str,
    *,
    batch_size: int | None,
    progress: Progress,
    measured: Measured,
) -> Report:
    """Remove layers of a model in memory; see :func:`neuronrank_torch.prune`."""
    started, decoder = time.perf_counter(), find_decoder(model)
    check_whole_layers(model, decoder, recipe)
    sequences = calibration_sequences(tokenizer, recipe, text)
    on_device = sequences.to(next(model.parameters()).device)
    removal = LayerRemoval(model, decoder, recipe, on_device, batch_size or micro_batch(recipe), progress, measured)
    layers = removal.run()
    return Report.of(
        recipe,
        layers,
        sum(p.numel() for p in model.parameters()),
        Calibration(sequences.numel(), text_fingerprint(text)),
        round(time.perf_counter() - started, 3),
        removal.notes,
    )
