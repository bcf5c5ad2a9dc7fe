"""The predictions of a model beside those of a reference, usually the model before pruning."""

from typing import Any

import numpy as np

from neuronrank_core.errors import InputError
from neuronrank_core.measures import Divergence, divergence
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.evaluation.perplexity import Perplexity, from_windows
from neuronrank_torch.evaluation.windows import Evaluated, score_windows
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.text.sequences import BosMode, bos_token, evaluation_windows


class IncomparableError(InputError):
    """Two models whose predictions cannot be compared token by token."""


def compare_predictions(
    reference: Evaluated,
    model: Evaluated,
    tokenizers: tuple[Any, Any],
    text: str,
    *,
    seqlen: int,
    windows: int | None = None,
    bos_mode: BosMode = "window",
    batch_size: int = 1,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> tuple[Perplexity, Perplexity, Divergence]:
    """Perplexities of two models on a text, and the divergence of the second one from the first, in a single pass.

    Parameters
    ----------
    reference, model : Evaluated
        If both are streamed, neither is ever whole in memory.
    tokenizers : tuple of PreTrainedTokenizerBase
        Of the reference and of the model.
    text, seqlen, windows, bos_mode
        As in :func:`neuronrank_torch.evaluation.perplexity.evaluate`.
    batch_size, progress, ranks
        As in :func:`neuronrank_torch.evaluation.windows.score_windows`.

    Raises
    ------
    IncomparableError
        If the models do not predict the same tokens.
    InputError
        If the text is too short, or a model cannot process it.
    NonFiniteError
        If the output of a model is not finite.
    """
    pair = reference, model
    _check_vocabulary(pair, tokenizers)
    cut, other = (
        evaluation_windows(tokenizer, text, seqlen=seqlen, windows=windows, bos_mode=bos_mode)
        for tokenizer in tokenizers
    )
    if not np.array_equal(cut, other):
        raise _incomparable("their tokenizers split the text differently")
    scores = score_windows(pair, cut, batch_size=batch_size, progress=progress, ranks=ranks)
    bos = None if bos_token(tokenizers[0]) is None else bos_mode
    dense, own = (from_windows([window.nll[i] for window in scores], seqlen, bos) for i in range(2))
    kl, same = (np.concatenate([getattr(window, name) for window in scores]) for name in ("kl", "same"))
    nll = (np.array([window.nll[i] for window in scores]) / (seqlen - 1) for i in range(2))
    return dense, own, divergence(kl, same, *nll)


def _check_vocabulary(pair: tuple[Evaluated, Evaluated], tokenizers: tuple[Any, Any]) -> None:
    a, b = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if a != b:
        differing = len(dict(a.items() ^ b.items()))
        raise _incomparable(f"{differing} tokens of their vocabularies differ")
    heads = [each.model.get_output_embeddings() for each in pair]
    widths = [head.weight.shape[0] for head in heads if head is not None]
    if len(set(widths)) > 1:
        raise _incomparable(f"they predict {widths[0]} and {widths[1]} tokens")


def _incomparable(why: str) -> IncomparableError:
    return IncomparableError(
        f"the predictions of the two models cannot be compared: {why}",
        hint="the reference is the model before pruning, with its own tokenizer",
    )
