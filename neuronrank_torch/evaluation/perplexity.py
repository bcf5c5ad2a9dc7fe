"""Perplexity: the exponential of the mean negative log-likelihood a model gives to each token of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from neuronrank_core.errors import InvalidValueError, NonFiniteError
from neuronrank_torch.calibration.layerwise import LayerRun, layers_done, run_layers
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.model.limits import check_tokens
from neuronrank_torch.model.streaming import HEAD, Resident
from neuronrank_torch.model.structure import Decoder, find_decoder
from neuronrank_torch.text.sequences import BosMode, Tokens, bos_token, cut_windows, tokenize

#: Tokens that go through a streamed model together on each rank: their hidden states are in memory, and its weights
#: are read once.
STREAMED_TOKENS = 1 << 16
#: Positions whose float32 log-probabilities are in memory at a time: 256 x 128k tokens are 128 MiB.
_POSITIONS = 256
#: Called after each forward pass with (steps done, steps in all); a step is a window through the model, or through one
#: layer of a streamed one.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, with what it was measured on; it means nothing without.

    Attributes
    ----------
    perplexity : float
        ``exp(nll)``.
    nll : float
        Mean negative log-likelihood of a token, in nats.
    predicted_tokens : int
        Tokens the mean is over: ``windows * (seqlen - 1)``.
    windows, seqlen : int
        Number of windows, and tokens in each.
    bos : {"window", "text"} or None
        Whether a beginning-of-sequence token begins every window, the text alone, or nothing.
    """

    perplexity: float
    nll: float
    predicted_tokens: int
    windows: int
    seqlen: int
    bos: BosMode | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers and strings, for JSON."""
        return asdict(self)


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    seqlen: int,
    windows: int | None = None,
    bos_mode: BosMode = "window",
    batch_size: int = 1,
    on_progress: OnProgress = lambda done, total: None,
    resident: Resident | None = None,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """Tokenize a text, cut it in windows and measure a model's perplexity on them.

    Parameters
    ----------
    model, tokenizer : transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
        A causal language model and its tokenizer.
    text : str
        The text.
    seqlen, windows, bos_mode
        As in :func:`neuronrank_torch.text.sequences.cut_windows`; ``bos_mode`` matters only where the tokenizer adds a
        beginning-of-sequence token.
    batch_size, on_progress, resident, ranks
        As in :func:`perplexity`.

    Returns
    -------
    Perplexity

    Raises
    ------
    InputError
        If the text is too short.
    NonFiniteError
        If the model's output is not finite.
    """
    bos = bos_token(tokenizer)
    cut = cut_windows(tokenize(tokenizer, text), seqlen=seqlen, windows=windows, bos=bos, bos_mode=bos_mode)
    used = None if bos is None else bos_mode
    return perplexity(
        model, cut, batch_size=batch_size, bos=used, on_progress=on_progress, resident=resident, ranks=ranks
    )


def perplexity(
    model: Any,
    windows: Tokens,
    *,
    batch_size: int = 1,
    bos: BosMode | None = None,
    on_progress: OnProgress = lambda done, total: None,
    resident: Resident | None = None,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """Measure a model's perplexity on windows of tokens; the first token of each is given, not predicted.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model. Evaluated in eval mode without gradients, and left in the mode it was in.
    windows : ndarray of int64, shape (windows, seqlen)
        From :func:`neuronrank_torch.text.sequences.cut_windows`.
    batch_size : int
        Windows in a forward pass; the logits of all of them are in memory at once.
    bos : {"window", "text"} or None
        How the windows were made, for the record.
    on_progress : callable
        See :data:`OnProgress`.
    resident : callable, optional
        Context in which a layer (by number) or the head of a model has its weights, if the model is streamed:
        :meth:`neuronrank_torch.model.streaming.StreamedModel.resident`.
    ranks : Ranks
        Processes that share the windows, each with the whole model; all get the figure that one alone would get.

    Returns
    -------
    Perplexity

    Raises
    ------
    InputError
        If there is nothing to predict, or the model has no place for the windows
        (:func:`neuronrank_torch.model.limits.check_tokens`).
    NonFiniteError
        If a likelihood is not finite.
    """
    _check(model, windows, batch_size)
    count, seqlen = windows.shape
    decoder = None if resident is None else find_decoder(model)
    blocks = _blocks(count, count if decoder is None else -(-STREAMED_TOKENS // seqlen), batch_size, ranks)
    passes = 1 if decoder is None else 1 + len(decoder.layers)
    progress = _Progress(on_progress, passes * sum(block.stop - block.start for block in blocks))
    nll: list[float] = []
    with _evaluating(model):
        for block in blocks:
            tokens = torch.from_numpy(windows[block]).to(model.get_input_embeddings().weight.device)
            with ExitStack() as stack:
                if decoder is not None and resident is not None:
                    hidden = _through_layers(decoder, tokens, batch_size, progress, resident)
                    stack.enter_context(layers_done(decoder, hidden))
                    stack.enter_context(resident(HEAD))
                nll += ranks.union(_block_nll(model, tokens, batch_size, block.start, progress))
    predicted = count * (seqlen - 1)
    mean = math.fsum(nll) / predicted
    return Perplexity(_exp(mean), mean, predicted, count, seqlen, bos)


def _blocks(count: int, block: int, batch_size: int, ranks: Ranks) -> list[slice]:
    """Windows of each block that are this rank's; the micro-batches are the same whatever the number of ranks."""
    block = ranks.size * batch_size * -(-block // batch_size)
    shares = ((first, ranks.share(min(block, count - first), batch_size)) for first in range(0, count, block))
    return [slice(first + share.start, first + share.stop) for first, share in shares]


class _Progress:
    """Counts steps and passes them on."""

    def __init__(self, report: OnProgress, total: int) -> None:
        self.report, self.done, self.total = report, 0, total

    def __call__(self, steps: int) -> None:
        self.done += steps
        self.report(self.done, self.total)


def _through_layers(
    decoder: Decoder, windows: torch.Tensor, batch_size: int, progress: _Progress, resident: Resident
) -> torch.Tensor:
    """Hidden states of windows that leave the last layer."""

    def visit(run: LayerRun) -> None:
        run.feed(keep=True, after=lambda start: progress(len(windows[start : start + batch_size])))

    return run_layers(decoder, windows, visit, batch_size=batch_size, resident=resident)


def _block_nll(model: Any, windows: torch.Tensor, batch_size: int, first: int, progress: _Progress) -> list[float]:
    """Sum of -log p(token) over each window; the first has the number ``first``."""
    sums = []
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        logits = model(input_ids=batch, use_cache=False).logits
        for offset, (scores, tokens) in enumerate(zip(logits, batch, strict=True)):
            nll = _window_nll(scores[:-1], tokens[1:])
            if not math.isfinite(nll):
                raise NonFiniteError(
                    f"the model's likelihoods are not finite in window {first + start + offset}",
                    hint="try --dtype float32, and check the model's weights",
                )
            sums.append(nll)
        progress(len(batch))
    return sums


def _window_nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of -log p(target) over one window: log-softmax in float32, sum in float64.

    Shapes: logits (positions, vocabulary), targets (positions,).
    """
    total = 0.0
    for scores, wanted in zip(
        torch.split(logits, _POSITIONS), torch.split(targets.to(logits.device), _POSITIONS), strict=True
    ):
        losses = torch.nn.functional.cross_entropy(scores.float(), wanted, reduction="none")
        total += losses.double().sum().item()
    return total


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError as error:
        raise NonFiniteError(
            f"perplexity overflows: the mean negative log-likelihood is {nll:.4g}", hint="check the model's weights"
        ) from error


def _check(model: Any, windows: Tokens, batch_size: int) -> None:
    if batch_size < 1:
        raise InvalidValueError("batch_size", batch_size, "an integer >= 1")
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InvalidValueError("shape of windows", windows.shape, "(at least 1, at least 2)")
    check_tokens(model, windows)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode and inference mode; afterwards every submodule is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
