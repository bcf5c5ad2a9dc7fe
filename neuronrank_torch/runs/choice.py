"""Compares recipes on a part of the calibration text that they are not calibrated on."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuronrank_core import NonFiniteError, Recipe
from neuronrank_core.effort import GAP, HELD_OUT, rehearsed, windows_held_out
from neuronrank_core.errors import InputError
from neuronrank_core.measures import first_within_error
from neuronrank_core.methods import check_recipe
from neuronrank_torch.calibration.layerwise import LayerRun, Others, embed, layers_done
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.evaluation.perplexity import from_windows
from neuronrank_torch.evaluation.windows import Evaluated, score_windows
from neuronrank_torch.model.streaming import HEAD, StreamedModel, Unit
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.prune import prune
from neuronrank_torch.pruning.result import LayerReport
from neuronrank_torch.pruning.store import InMemory, Measured
from neuronrank_torch.text.sequences import Tokens, calibration_sequences, evaluation_windows, micro_batch


@dataclass(frozen=True)
class Choice:
    """What ``--effort best``, ``--target-params`` or ``--max-loss`` compared, and what it chose.

    Parameters
    ----------
    chosen : str
        Name of the recipe, see :func:`neuronrank_core.measures.first_within_error`; what was removed for
        ``--target-params`` or ``--max-loss``.
    perplexity : dict of float
        Perplexity on held-out calibration text, by name; ``good`` is the recipe of ``--effort good``. Empty in
        a dry run.
    windows, seqlen : int
        Size of the held-out text.
    seconds : float
        Wall time of the comparison.
    dense : float or None
        Perplexity of the dense model; this and what follows are for ``--target-params`` and ``--max-loss`` only.
    passes : dict of float
        The ratio of each sparsity type that was removed, in this order.
    left_out : dict of str
        What the model does not allow, or a candidate that ended in NaN, with the reason.
    multiple_of : int
        What divides the width of the MLPs.
    parameters, kept : int
        Parameters outside input and output embeddings, before and after.
    """

    chosen: str
    perplexity: dict[str, float]
    windows: int = 0
    seqlen: int = 0
    seconds: float = 0.0
    dense: float | None = None
    passes: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    multiple_of: int = 1
    parameters: int = 0
    kept: int = 0


def split_text(text: str) -> tuple[str, str]:
    """The part to calibrate on and, after a gap, the part that is held out; split at the ends of lines, if possible."""

    def end_of_line(share: float) -> int:
        near = int(share * len(text))
        return text.rfind("\n", near - int(GAP / 2 * len(text)), near) + 1 or near

    return text[: end_of_line(1 - HELD_OUT - GAP)], text[end_of_line(1 - HELD_OUT) :]


def held_out_windows(tokenizer: Any, recipe: Recipe, text: str, asked: str = "--effort best") -> Tokens:
    """Windows of the held-out text, shape (windows, seqlen), spread over all of it.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    recipe : Recipe
        As candidates are run, :func:`neuronrank_core.effort.rehearsed`.
    text : str
    asked : str
        The option that compares candidates, for the error.

    Raises
    ------
    InputError
        If the text is too short.
    """
    try:
        cut = evaluation_windows(tokenizer, text, seqlen=recipe.seqlen, windows=None, bos_mode=recipe.bos)
    except InputError as error:
        raise InputError(
            f"{asked} holds out the last {HELD_OUT:.0%} of the calibration text: {error}", hint=error.hint
        ) from error
    wanted = windows_held_out(recipe)
    return cut[:: max(1, len(cut) // wanted)][:wanted]


def check_comparison(recipe: Recipe, tokenizer: Any, text: str) -> None:
    """Check that recipes can be compared on a part of a text; raises InputError or InvalidValueError."""
    calibration, rest = split_text(text)
    few = rehearsed(recipe)
    held_out_windows(tokenizer, few, rest)
    check_recipe(few)
    calibration_sequences(tokenizer, few, calibration)


class Rehearsal(InMemory):
    """Loads the layers of a streamed model one at a time; of what is pruned, only the head is kept."""

    def __init__(self, model: StreamedModel) -> None:
        super().__init__()
        self.model = model
        self.head: dict[str, Tensor] = {}

    def resident(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit is loaded: the pruned head, or what the source has."""
        return self.model.resident(unit, self.head.__getitem__ if unit == HEAD and self.head else None)

    def keep(self, unit: Unit, report: LayerReport | None) -> None:
        """Keep the head, through which the held-out text runs last."""
        del report
        if unit == HEAD:
            self.head = {name: tensor.clone() for name, tensor in self.model.tensors(unit).items()}


class HeldOut:
    """Held-out windows on their way through a model that is being pruned.

    Parameters
    ----------
    store : Rehearsal
        The model and its pruned head.
    windows : ndarray of int64, shape (windows, seqlen)
    batch_size : int
        Windows per micro-batch.
    ranks : Ranks
        Processes that share the windows.
    """

    def __init__(self, store: Rehearsal, windows: Tokens, batch_size: int, ranks: Ranks) -> None:
        self.store, self.windows, self.batch_size, self.ranks = store, windows, batch_size, ranks
        own = windows[ranks.share(len(windows), batch_size)]
        self.hidden = embed(store.model.decoder, torch.from_numpy(own).to(store.model.device))
        self.others: Others = None

    def visit(self, run: LayerRun) -> None:
        """Run the windows through a layer that has just been pruned."""
        own = LayerRun(run.layer, self.hidden, run.forward, self.batch_size, 0, lambda index: None, run.spare)
        own.feed(keep=True)
        self.others = own.others

    def nll(self, progress: Progress) -> list[float]:
        """For each window the sum of -log p(token) by the pruned model, after the last layer."""
        model = self.store.model
        with layers_done(model.decoder, self.hidden, self.others), self.store.resident(HEAD):
            how: dict[str, Any] = {"batch_size": self.batch_size, "progress": progress, "ranks": self.ranks}
            scores = score_windows([Evaluated(model.model, stage="held-out text")], self.windows, **how)
        return [window.nll[0] for window in scores]


def compare_recipes(
    reopen: Callable[[], StreamedModel],
    tokenizer: Any,
    candidates: Mapping[str, Recipe],
    text: str,
    measured: Measured,
    *,
    batch_size: int | None = None,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> Choice:
    """Prune a model by each recipe on the first part of a text, keep nothing, and measure it on the held-out part.

    Parameters
    ----------
    reopen : callable
        Opens the model with its original weights.
    tokenizer : transformers.PreTrainedTokenizerBase
    candidates : dict of Recipe
        By name; all with the same calibration. See :func:`neuronrank_core.measures.first_within_error` for the choice.
        In a single process, one other than the first whose scores or perplexity are not finite is left out.
    text : str
        Calibration text.
    measured : callable
        Keeps the measurements of an interrupted run.
    batch_size, progress, ranks
        As in :func:`neuronrank_torch.prune`.

    Raises
    ------
    NonFiniteError
        If the first candidate ends in NaN or Inf, or with several ranks any candidate.
    """
    started, found, left_out = time.perf_counter(), {}, {}
    calibration, rest = split_text(text)
    first = next(iter(candidates.values()))
    windows, batch = held_out_windows(tokenizer, rehearsed(first), rest), batch_size or micro_batch(first)
    count, seqlen = windows.shape

    def measure(recipe: Recipe, where: str) -> dict[str, Any]:
        def step(stage: str, done: int, total: int, unit: str) -> None:
            progress(f"candidate {where}: {stage}", done, total, unit)

        store = Rehearsal(reopen())
        with torch.no_grad():
            held = HeldOut(store, windows, batch, ranks)
        how: dict[str, Any] = {"batch_size": batch, "progress": step, "store": store, "ranks": ranks}
        prune(store.model.model, tokenizer, rehearsed(recipe), calibration, after=held.visit, **how)
        nll = held.nll(step)
        return {"nll": nll, "perplexity": from_windows(nll, seqlen, None).perplexity}

    for number, (name, recipe) in enumerate(candidates.items(), start=1):
        try:
            known = measured(f"candidate {name}", partial(measure, recipe, f"{number} of {len(candidates)}"))
        except NonFiniteError as error:  # The candidate failed, not the run; but other ranks may not have met it.
            if number == 1 or ranks.size > 1:
                raise
            left_out[name] = str(error)
        else:
            found[name] = known or {}
    chosen = first_within_error({name: np.divide(one["nll"], seqlen - 1) for name, one in found.items()})
    perplexity = {name: one["perplexity"] for name, one in found.items()}
    return Choice(chosen, perplexity, count, seqlen, round(time.perf_counter() - started, 3), left_out=left_out)
