"""Perplexity: the exponential of the mean negative log-likelihood a model gives to each token of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from neuronrank_core.errors import InputError, InvalidValueError, NonFiniteError
from neuronrank_torch.corpus import BosMode, Tokens, bos_token, cut_windows, tokenize

#: Positions whose float32 log-probabilities are in memory at a time: 256 x 128k tokens are 128 MiB.
_POSITIONS = 256


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
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Tokenize a text, cut it in windows and measure a model's perplexity on them.

    Parameters
    ----------
    model, tokenizer : transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
        A causal language model and its tokenizer.
    text : str
        The text.
    seqlen, windows, bos_mode
        As in :func:`neuronrank_torch.corpus.cut_windows`; ``bos_mode`` matters only where the tokenizer adds a
        beginning-of-sequence token.
    batch_size, on_progress
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
    return perplexity(model, cut, batch_size=batch_size, bos=used, on_progress=on_progress)


def perplexity(
    model: Any,
    windows: Tokens,
    *,
    batch_size: int = 1,
    bos: BosMode | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure a model's perplexity on windows of tokens; the first token of each is given, not predicted.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model. Evaluated in eval mode without gradients, and left in the mode it was in.
    windows : ndarray of int64, shape (windows, seqlen)
        From :func:`neuronrank_torch.corpus.cut_windows`.
    batch_size : int
        Windows in a forward pass; the logits of all of them are in memory at once.
    bos : {"window", "text"} or None
        How the windows were made, for the record.
    on_progress : callable, optional
        Called as ``on_progress(windows_done, windows_total)`` after each forward pass.

    Returns
    -------
    Perplexity

    Raises
    ------
    InputError
        If there is nothing to predict, or the windows hold tokens the model does not have.
    NonFiniteError
        If a likelihood is not finite.
    """
    _check(model, windows, batch_size)
    count, seqlen = windows.shape
    total = 0.0
    with _evaluating(model):
        for start in range(0, count, batch_size):
            batch = torch.from_numpy(windows[start : start + batch_size]).to(model.get_input_embeddings().weight.device)
            logits = model(input_ids=batch, use_cache=False).logits
            for offset, (scores, tokens) in enumerate(zip(logits, batch, strict=True)):
                nll = _window_nll(scores[:-1], tokens[1:])
                if not math.isfinite(nll):
                    raise NonFiniteError(
                        f"the model's likelihoods are not finite in window {start + offset}",
                        hint="try --dtype float32, and check the model's weights",
                    )
                total += nll
            if on_progress is not None:
                on_progress(start + len(batch), count)
    predicted = count * (seqlen - 1)
    mean = total / predicted
    return Perplexity(_exp(mean), mean, predicted, count, seqlen, bos)


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
        raise NonFiniteError(f"perplexity overflows: the mean negative log-likelihood is {nll:.4g}") from error


def _check(model: Any, windows: Tokens, batch_size: int) -> None:
    if batch_size < 1:
        raise InvalidValueError("batch_size", batch_size, "an integer >= 1")
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InvalidValueError("shape of windows", windows.shape, "(at least 1, at least 2)")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # Out of range, an embedding reads beyond its table: on CUDA that ends the whole process's use of the device.
    if windows.max() >= vocabulary:
        raise InputError(
            f"token {windows.max()} is outside the model's vocabulary of {vocabulary}",
            hint="use the tokenizer that belongs to the model",
        )


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
