"""Runs one model, or two side by side, over windows of tokens and scores every predicted token."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neuronrank_core.errors import InvalidValueError, NonFiniteError
from neuronrank_torch.calibration.layerwise import LayerRun, NotLayerByLayerError, Others, layers_done, run_layers
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.kernels import kl_divergence, same_top
from neuronrank_torch.model.eval_mode import eval_mode
from neuronrank_torch.model.limits import check_tokens
from neuronrank_torch.model.streaming import HEAD, Resident
from neuronrank_torch.model.structure import Decoder, find_decoder
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.text.sequences import Tokens

#: Tokens per block of windows when a model is streamed. The hidden states of a block are in memory on each rank, and
#: the weights are read once per block.
STREAMED_TOKENS = 1 << 16
#: Positions whose float32 log-probabilities are in memory at a time: of one model, 64 x 128k tokens are 32 MiB.
_POSITIONS = 64


class Evaluated:
    """A model to evaluate.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    resident : callable, optional
        For a streamed model: context in which a layer (by number) or the head has its weights, see
        :meth:`neuronrank_torch.model.streaming.StreamedModel.resident`.
    stage : str
        Name of this measurement in ``progress``.
    """

    def __init__(self, model: Any, resident: Resident | None = None, stage: str = "perplexity") -> None:
        self.model, self.resident, self.stage = model, resident, stage
        self.decoder: Decoder | None = None if resident is None else find_decoder(model)

    @property
    def layers(self) -> int:
        """Layers that run one at a time; 0 if the model is not streamed."""
        return len(self.decoder.layers) if self.decoder else 0

    def through_layers(
        self, windows: torch.Tensor, batch_size: int, at_layer: Callable[[int], None]
    ) -> AbstractContextManager[None]:
        """Run windows through the layers of a streamed model; in the returned context, its forward goes on from there.

        Only the head is in memory in that context. A model that is not streamed runs as a whole there, and so does one
        that does not run one layer at a time, with all its weights in memory.
        """
        if self.decoder is None or self.resident is None:
            return nullcontext()
        others: Others = None

        def visit(run: LayerRun) -> None:
            nonlocal others
            at_layer(run.index)
            run.feed(keep=True)
            others = run.others

        try:
            hidden = run_layers(self.decoder, windows, visit, batch_size=batch_size, resident=self.resident)
        except NotLayerByLayerError:
            return _whole(self.decoder, self.resident)
        return _at_head(self.decoder, hidden, others, self.resident)


@contextmanager
def _at_head(decoder: Decoder, hidden: torch.Tensor, others: Others, resident: Resident) -> Iterator[None]:
    with layers_done(decoder, hidden, others), resident(HEAD):
        yield


@contextmanager
def _whole(decoder: Decoder, resident: Resident) -> Iterator[None]:
    with ExitStack() as units:
        for unit in (*range(len(decoder.layers)), HEAD):
            units.enter_context(resident(unit))
        yield


@dataclass(frozen=True)
class WindowScores:
    """Scores of the predicted tokens of one window.

    Parameters
    ----------
    nll : list of float
        For each model, the sum of -log p(token).
    kl : float32 ndarray, shape (seqlen - 1,), or None
        Of two models: KL divergence from the first one's distribution to the second one's.
    same : bool ndarray, shape (seqlen - 1,), or None
        Of two models: whether their most likely token is the same.
    """

    nll: list[float]
    kl: NDArray[np.float32] | None = None
    same: NDArray[np.bool_] | None = None


def score_windows(
    models: Sequence[Evaluated],
    windows: Tokens,
    *,
    batch_size: int = 1,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> list[WindowScores]:
    """Score each window by one model, or by two side by side. The first token of a window is given, not predicted.

    Streamed models run one after the other, layer by layer, over a block of windows. Their final hidden states are
    kept, and then their own forwards go on from there, with both heads in memory, one micro-batch at a time.

    Parameters
    ----------
    models : sequence of Evaluated
        One or two, on the same device. They are in eval mode without gradients; their modes are restored afterwards.
    windows : int64 ndarray, shape (windows, seqlen)
    batch_size : int
        Windows per forward pass. Their logits are in memory at the same time.
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`. Counts the layers of streamed models, otherwise windows.
    ranks : Ranks
        Processes that share the windows. All return the same result as a single process.

    Raises
    ------
    InputError
        If there is nothing to predict, or a model cannot process the windows.
    NonFiniteError
        If a likelihood or a divergence is not finite.
    """
    if batch_size < 1:
        raise InvalidValueError("batch_size", batch_size, "an integer >= 1")
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InvalidValueError("shape of windows", windows.shape, "(at least 1, at least 2)")
    for each in models:
        check_tokens(each.model, windows)
    count, seqlen = windows.shape
    layers = sum(each.layers for each in models)
    blocks = _blocks(count, -(-STREAMED_TOKENS // seqlen) if layers else count, batch_size, ranks)
    scores: list[WindowScores] = []

    def at_layer(each: Evaluated, done: int, layer: int) -> None:
        where = f"layer {layer + 1} of {each.layers}" if layer < each.layers else "output head"
        progress(f"{each.stage}: {where}", done + layer, len(blocks) * layers, "layers")

    def at_window(done: int) -> None:
        if not layers:
            progress(models[-1].stage, done, sum(block.stop - block.start for block in blocks), "windows")

    with ExitStack() as stack:
        for each in models:
            stack.enter_context(eval_mode(each.model))
        stack.enter_context(torch.inference_mode())
        for number, block in enumerate(blocks):
            tokens = torch.from_numpy(windows[block]).to(models[0].model.get_input_embeddings().weight.device)
            done, ran = number * layers, []
            for each in models:
                ran.append(each.through_layers(tokens, batch_size, partial(at_layer, each, done)))
                done += each.layers
            if layers:
                at_layer(each, done - each.layers, each.layers)
            with ExitStack() as heads:
                for context in ran:
                    heads.enter_context(context)
                scores += ranks.union(_block_scores(models, tokens, batch_size, block.start, at_window))
    return scores


def _blocks(count: int, block: int, batch_size: int, ranks: Ranks) -> list[slice]:
    """Windows of each block that belong to this rank. Micro-batches are the same for any number of ranks."""
    block = ranks.size * batch_size * -(-block // batch_size)
    shares = ((first, ranks.share(min(block, count - first), batch_size)) for first in range(0, count, block))
    return [slice(first + share.start, first + share.stop) for first, share in shares]


def _block_scores(
    models: Sequence[Evaluated], windows: torch.Tensor, batch_size: int, first: int, at_window: Callable[[int], None]
) -> list[WindowScores]:
    """Scores of each window of a block. ``first`` is the number of the first window."""
    scores = []
    for start in range(0, len(windows), batch_size):
        at_window(start)
        scores += _batch_scores(models, windows[start : start + batch_size], first + start)
    at_window(len(windows))
    return scores


def _batch_scores(models: Sequence[Evaluated], windows: torch.Tensor, first: int) -> list[WindowScores]:
    """Scores of the windows of one micro-batch. A function of its own, so that the logits are freed before the next."""
    logits = [each.model(input_ids=windows, use_cache=False).logits for each in models]
    scores = []
    for offset, tokens in enumerate(windows):
        found = _window_scores([of_model[offset, :-1] for of_model in logits], tokens[1:])
        _check_finite(found, first + offset)
        scores.append(found)
    return scores


def _window_scores(logits: Sequence[torch.Tensor], targets: torch.Tensor) -> WindowScores:
    """Scores of one window, in float32; sums over its tokens in float64.

    Shapes: logits of each model (positions, vocabulary), targets (positions,).
    """
    nll: list[list[torch.Tensor]] = [[] for _ in logits]
    kl, same = [], []
    for chunk in range(0, len(targets), _POSITIONS):
        positions = slice(chunk, chunk + _POSITIONS)
        log_p = [of_model[positions].float().log_softmax(dim=-1) for of_model in logits]
        for losses, of_model in zip(nll, log_p, strict=True):
            losses.append(-of_model.gather(1, targets[positions, None].to(of_model.device))[:, 0])
        if len(log_p) == 2:
            kl.append(kl_divergence(*log_p))
            same.append(same_top(*log_p))
    sums = [torch.cat(losses).double().sum().item() for losses in nll]
    return WindowScores(sums, torch.cat(kl).cpu().numpy(), torch.cat(same).cpu().numpy()) if kl else WindowScores(sums)


def _check_finite(scores: WindowScores, window: int) -> None:
    what = ""
    if not math.isfinite(scores.nll[-1]):
        what = "the model's likelihoods are"
    elif not math.isfinite(scores.nll[0]):
        what = "the reference's likelihoods are"
    elif scores.kl is not None and not math.isfinite(float(scores.kl.sum(dtype=float))):
        what = "the KL divergence is"
    if what:
        raise NonFiniteError(
            f"{what} not finite in window {window}",
            hint="try --dtype float32, and check the model's weights",
        )
