"""Perplexity: the exponential of the mean negative log-likelihood a model gives to each token of a text."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neuronrank_core.errors import NonFiniteError
from neuronrank_core.measures import perplexity_standard_error
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.evaluation.windows import Evaluated, score_windows
from neuronrank_torch.model.streaming import Resident
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.text.sequences import BosMode, Tokens, bos_token, evaluation_windows


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
    standard_error : float or None
        Standard error of ``perplexity`` over the windows, see
        :func:`neuronrank_core.measures.perplexity_standard_error`; null for a single window.
    """

    perplexity: float
    nll: float
    predicted_tokens: int
    windows: int
    seqlen: int
    bos: BosMode | None
    standard_error: float | None = None

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
    scores = score_windows(
        [Evaluated(model, resident, stage)], windows, batch_size=batch_size, progress=progress, ranks=ranks
    )
    return from_windows([window.nll[0] for window in scores], windows.shape[1], bos)


def from_windows(nll: Sequence[float], seqlen: int, bos: BosMode | None) -> Perplexity:
    """The perplexity from the sum of -log p(token) of each window; raises NonFiniteError if it overflows."""
    predicted = len(nll) * (seqlen - 1)
    mean = math.fsum(nll) / predicted
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    error = perplexity_standard_error([of_window / (seqlen - 1) for of_window in nll])
    if not math.isfinite(value + (error or 0.0)):
        raise NonFiniteError(
            f"perplexity overflows: the mean negative log-likelihood is {mean:.4g}", hint="check the model's weights"
        )
    return Perplexity(value, mean, predicted, len(nll), seqlen, bos, error)
