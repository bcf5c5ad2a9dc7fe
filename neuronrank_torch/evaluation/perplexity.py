"""Perplexity: the exponential of the mean negative log-likelihood a model gives to each token of a text."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from neuronrank_core.errors import InvalidValueError, NonFiniteError
from neuronrank_torch.calibration.layerwise import LayerRun, Others, layers_done, run_layers
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.model.eval_mode import eval_mode
from neuronrank_torch.model.limits import check_tokens
from neuronrank_torch.model.streaming import HEAD, Resident
from neuronrank_torch.model.structure import Decoder, find_decoder
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.text.sequences import BosMode, Tokens, bos_token, evaluation_windows

#: Tokens per block of windows when a model is streamed. The hidden states of a block are in memory on each rank, and
#: the weights are read once per block.
STREAMED_TOKENS = 1 << 16
#: Positions whose float32 log-probabilities are in memory at a time: 256 x 128k tokens are 128 MiB.
_POSITIONS = 256


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and the protocol it was measured with. Two figures are comparable only if their protocols agree.

    Parameters
    ----------
    perplexity : float
        ``exp(nll)``.
    nll : float
        Mean negative log-likelihood per token, in nats.
    predicted_tokens : int
        Number of tokens the mean is taken over: ``windows * (seqlen - 1)``.
    windows : int
        Number of windows.
    seqlen : int
        Tokens per window.
    bos : {"window", "text"} or None
        Where a beginning-of-sequence token was added: at every window, at the start of the text, or nowhere.
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
    progress: Progress = silent,
    stage: str = "perplexity",
    resident: Resident | None = None,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """Tokenize a text, split it into windows and measure a model's perplexity on them.

    Parameters
    ----------
    model, tokenizer : transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
        A causal language model and its tokenizer.
    text : str
        The text.
    seqlen, windows, bos_mode
        As in :func:`neuronrank_torch.text.sequences.cut_windows`; ``bos_mode`` matters only where the tokenizer adds a
        beginning-of-sequence token.
    batch_size, progress, stage, resident, ranks
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
    cut = evaluation_windows(tokenizer, text, seqlen=seqlen, windows=windows, bos_mode=bos_mode)
    used = None if bos_token(tokenizer) is None else bos_mode
    return perplexity(
        model, cut, batch_size=batch_size, bos=used, progress=progress, stage=stage, resident=resident, ranks=ranks
    )


def perplexity(
    model: Any,
    windows: Tokens,
    *,
    batch_size: int = 1,
    bos: BosMode | None = None,
    progress: Progress = silent,
    stage: str = "perplexity",
    resident: Resident | None = None,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """Measure a model's perplexity on windows of tokens. The first token of each window is given, not predicted.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model. It is evaluated in eval mode without gradients; its mode is restored afterwards.
    windows : ndarray of int64, shape (windows, seqlen)
        From :func:`neuronrank_torch.text.sequences.cut_windows`.
    batch_size : int
        Windows per forward pass. Their logits are in memory at the same time.
    bos : {"window", "text"} or None
        How the windows were cut. Only recorded in the result.
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`. Counts windows, or the layers of a streamed model.
    stage : str
        Name of this measurement in ``progress``.
    resident : callable, optional
        For a streamed model: context in which a layer (by number) or the head has its weights, see
        :meth:`neuronrank_torch.model.streaming.StreamedModel.resident`.
    ranks : Ranks
        Processes that share the windows, each with the whole model. All return the same result as a single process.

    Returns
    -------
    Perplexity

    Raises
    ------
    InputError
        If there is nothing to predict, or the model cannot process the windows
        (:func:`neuronrank_torch.model.limits.check_tokens`).
    NonFiniteError
        If a likelihood is not finite.
    """
    if batch_size < 1:
        raise InvalidValueError("batch_size", batch_size, "an integer >= 1")
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InvalidValueError("shape of windows", windows.shape, "(at least 1, at least 2)")
    check_tokens(model, windows)
    count, seqlen = windows.shape
    decoder = None if resident is None else find_decoder(model)
    blocks = _blocks(count, count if decoder is None else -(-STREAMED_TOKENS // seqlen), batch_size, ranks)
    nll: list[float] = []

    def at_window(done: int) -> None:
        if decoder is None:  # A streamed model counts layers.
            progress(stage, done, sum(block.stop - block.start for block in blocks), "windows")

    with eval_mode(model), torch.inference_mode():
        for number, block in enumerate(blocks):
            tokens = torch.from_numpy(windows[block]).to(model.get_input_embeddings().weight.device)
            context: AbstractContextManager[None] = nullcontext()
            if decoder is not None and resident is not None:
                at_layer = _layer_progress(progress, stage, len(decoder.layers), number, len(blocks))
                context = _through_layers(decoder, tokens, batch_size, at_layer, resident)
            with context:
                nll += ranks.union(_block_nll(model, tokens, batch_size, block.start, at_window))
    predicted = count * (seqlen - 1)
    mean = math.fsum(nll) / predicted
    try:
        return Perplexity(math.exp(mean), mean, predicted, count, seqlen, bos)
    except OverflowError as error:
        raise NonFiniteError(
            f"perplexity overflows: the mean negative log-likelihood is {mean:.4g}", hint="check the model's weights"
        ) from error


def _blocks(count: int, block: int, batch_size: int, ranks: Ranks) -> list[slice]:
    """Windows of each block that belong to this rank. Micro-batches are the same for any number of ranks."""
    block = ranks.size * batch_size * -(-block // batch_size)
    shares = ((first, ranks.share(min(block, count - first), batch_size)) for first in range(0, count, block))
    return [slice(first + share.start, first + share.stop) for first, share in shares]


def _layer_progress(progress: Progress, stage: str, layers: int, block: int, blocks: int) -> Callable[[int], None]:
    """A function to call with the number of the layer that runs next, or with ``layers`` for the output head."""

    def at_layer(layer: int) -> None:
        where = f"layer {layer + 1} of {layers}" if layer < layers else "output head"
        progress(f"{stage}: {where}", block * layers + layer, blocks * layers, "layers")

    return at_layer


@contextmanager
def _through_layers(
    decoder: Decoder, windows: torch.Tensor, batch_size: int, at_layer: Callable[[int], None], resident: Resident
) -> Iterator[None]:
    """Run windows through the layers of a streamed model; then its forward goes on from there, with the head."""
    others: Others = None

    def visit(run: LayerRun) -> None:
        nonlocal others
        at_layer(run.index)
        run.feed(keep=True)
        others = run.others

    hidden = run_layers(decoder, windows, visit, batch_size=batch_size, resident=resident)
    at_layer(len(decoder.layers))
    with layers_done(decoder, hidden, others), resident(HEAD):
        yield


def _block_nll(
    model: Any, windows: torch.Tensor, batch_size: int, first: int, at_window: Callable[[int], None]
) -> list[float]:
    """Sum of -log p(token) over each window. ``first`` is the number of the first window."""
    sums = []
    for start in range(0, len(windows), batch_size):
        at_window(start)
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
    at_window(len(windows))
    return sums


def _window_nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of -log p(target) over one window: log-softmax in float32, sum in float64.

    Shapes: logits (positions, vocabulary), targets (positions,).
    """
    total = 0.0
    chunks = torch.split(logits, _POSITIONS), torch.split(targets.to(logits.device), _POSITIONS)
    for scores, wanted in zip(*chunks, strict=True):
        losses = torch.nn.functional.cross_entropy(scores.float(), wanted, reduction="none")
        total += losses.double().sum().item()
    return total
