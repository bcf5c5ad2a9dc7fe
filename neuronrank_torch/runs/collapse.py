"""Whether a smaller model still predicts text: a check after every removal of neurons, heads or layers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from neuronrank_core import InputError, Recipe
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.evaluation.windows import Evaluated, score_windows
from neuronrank_torch.model.streaming import StreamedModel
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.runs.prune_result import PerplexityChange
from neuronrank_torch.text.sequences import CHARACTERS, evaluation_windows

#: Rise of the perplexity from which on a warning says so.
COLLAPSED = 10.0
#: Windows of the calibration text on which it is measured.
WINDOWS = 4


def collapse_notes(
    reopen: Callable[[], StreamedModel],
    pruned: Evaluated,
    tokenizer: Any,
    recipe: Recipe,
    text: str,
    change: PerplexityChange | None,
    *,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> tuple[str, ...]:
    """A note if a model from which something was removed no longer predicts text.

    Parameters
    ----------
    reopen : callable
        Opens the dense model.
    pruned : Evaluated
    tokenizer : transformers.PreTrainedTokenizerBase
    recipe : Recipe
    text : str
        Calibration text, on the first windows of which both models are measured; empty if there is none.
    change : PerplexityChange or None
        The perplexities, if they have been measured on another text.
    progress, ranks
        As in :func:`neuronrank_torch.evaluation.windows.score_windows`.
    """
    if not recipe.structured or not (change or text):
        return ()
    if change is not None:
        rise = change.after.perplexity / change.before.perplexity
    else:
        dense = reopen()
        how: dict[str, Any] = {"seqlen": recipe.seqlen, "windows": None, "bos_mode": recipe.bos}
        try:
            cut = evaluation_windows(tokenizer, text[: WINDOWS * CHARACTERS * recipe.seqlen], **how)[:WINDOWS]
        except InputError:  # A text with few tokens in many characters.
            cut = evaluation_windows(tokenizer, text, **how)[:WINDOWS]
        pair = [Evaluated(dense.model, dense.resident, "checking the dense model"), pruned]
        scores = score_windows(pair, cut, progress=progress, ranks=ranks)
        rise = float(np.exp(sum(one.nll[1] - one.nll[0] for one in scores) / (len(cut) * (recipe.seqlen - 1))))
    if rise <= COLLAPSED:
        return ()
    return (f"the model no longer predicts text: its perplexity is {rise:.4g} times that before; remove less",)
