"""Chooses what to remove so that a model reaches a size or keeps to a loss, by measuring candidates in memory."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from neuronrank_core import AllZeroMetricError, InputError, NeuronRankError, NonFiniteError, Recipe
from neuronrank_core.errors import UnreachableError
from neuronrank_core.mixes import (
    COMPARED_AT,
    SHARES,
    SLACK,
    Mix,
    Sizes,
    Target,
    described,
    left,
    mixes,
    passes,
    rehearsed,
    width_multiple,
)
from neuronrank_torch.evaluation.perplexity import Perplexity, perplexity
from neuronrank_torch.model.converted import ConvertedWeights
from neuronrank_torch.model.limits import check_memory
from neuronrank_torch.model.streaming import StreamedModel
from neuronrank_torch.model.weights import WeightSource
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.passes import outside_embeddings, prune_in_passes, sizes_of
from neuronrank_torch.pruning.store import Measured
from neuronrank_torch.runs.choice import Choice, held_out_windows, split_text
from neuronrank_torch.saving.names import Names
from neuronrank_torch.text.sequences import Tokens, calibration_sequences, micro_batch

#: Errors of a candidate that the others are compared without: a width that the class refuses together with fewer heads,
#: or NaN.
FAILED = (InputError, NonFiniteError, AllZeroMetricError)


@dataclass(frozen=True)
class Candidates:
    """What can be compared for a target.

    Parameters
    ----------
    target : Target
    recipe : Recipe
    sizes : Sizes
    left_out : dict of str
        As in :class:`Choice`.
    """

    target: Target
    recipe: Recipe
    sizes: Sizes
    left_out: Mapping[str, str]

    @classmethod
    def of(cls, model: Any, target: Target, recipe: Recipe) -> "Candidates":
        """Those of a model, which may be on the meta device; raises InputError if no mix reaches the target."""
        found = cls(target, recipe, *sizes_of(model, recipe))
        if target.target_params is not None:
            found.mixes(target.target_params)
        elif not found.shares:
            found.mixes(COMPARED_AT)
        return found

    @property
    def shares(self) -> list[float]:
        """The shares of the parameters, from the smallest on, that a mix reaches."""
        return [share for share in SHARES if mixes(self.sizes, share, self.recipe)]

    def mixes(self, share: float) -> dict[str, Mix]:
        """The mixes for a share of the parameters; raises InputError if there is none."""
        if found := mixes(self.sizes, share, self.recipe):
            return found
        why = "; ".join(f"{kind}: {reason}" for kind, reason in self.left_out.items())
        raise InputError(
            f"nothing that can be removed leaves {max(0, share - SLACK):.0%} to {share:.0%} of the parameters outside"
            f" the embeddings{f' ({why})' if why else ''}",
            hint=f"choose another {self.target.flag}, or a smaller --multiple-of or --divisible-by",
        )

    def result(self, mix: Mix, **measured: Any) -> Choice:
        """The choice of a mix."""
        return Choice(
            chosen=described(mix),
            passes={one.sparsity_type: one.ratio for one in passes(mix, self.recipe)},
            left_out=dict(self.left_out),
            multiple_of=width_multiple(self.sizes, self.recipe),
            parameters=self.sizes.parameters,
            kept=left(self.sizes, mix),
            **measured,
        )


def check_text(candidates: Candidates, mixes: Iterable[Mix], tokenizer: Any, text: str) -> None:
    """Check that mixes can be compared on a part of a text; raises InputError."""
    calibration, rest = split_text(text)
    [few] = rehearsed([candidates.recipe])
    held_out_windows(tokenizer, few, rest, candidates.target.flag)
    for mix in mixes:
        for recipe in rehearsed(passes(mix, candidates.recipe)):
            calibration_sequences(tokenizer, recipe, calibration)


class Comparison:
    """Measures candidates on held-out calibration text, each on a copy of the model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The dense model, in memory.
    tokenizer : transformers.PreTrainedTokenizerBase
    candidates : Candidates
    text : str
        Calibration text.
    measured : callable
        Keeps the measurements of an interrupted run.
    batch_size, progress
        As in :func:`neuronrank_torch.prune`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        candidates: Candidates,
        text: str,
        measured: Measured,
        *,
        batch_size: int | None = None,
        progress: Progress = silent,
    ) -> None:
        self.model, self.tokenizer, self.candidates = model, tokenizer, candidates
        self.measured, self.progress = measured, progress
        self.calibration, rest = split_text(text)
        [few] = rehearsed([candidates.recipe])
        self.batch_size = batch_size or micro_batch(few)
        self.windows: Tokens = held_out_windows(tokenizer, few, rest, candidates.target.flag)
        self.found: dict[str, float] = {}
        self.failed: dict[str, NeuronRankError] = {}
        self.dense = self._perplexity("before", lambda: model)

    def _perplexity(self, name: str, model: Callable[[], Any]) -> float:
        how: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.progress}
        found = self.measured(name, lambda: perplexity(model(), self.windows, **how).to_dict())
        return Perplexity(**found or {}).perplexity

    def measure(self, mix: Mix) -> float:
        """Perplexity of a copy of the model without the mix."""
        name = described(mix)
        if name not in self.found:

            def step(stage: str, done: int, total: int, unit: str) -> None:
                self.progress(f"candidate {len(self.found) + 1}: {stage}", done, total, unit)

            def pruned() -> Any:
                model, recipes = copy.deepcopy(self.model), rehearsed(passes(mix, self.candidates.recipe))
                how: dict[str, Any] = {"batch_size": self.batch_size, "progress": step}
                prune_in_passes(model, self.tokenizer, recipes, self.calibration, **how)
                return model

            self.found[name] = self._perplexity(f"candidate {name}", pruned)
        return self.found[name]

    def cost(self, mix: Mix) -> float:
        """The same; infinite if the candidate fails, which is then left out."""
        try:
            return self.measure(mix)
        except FAILED as error:
            self.failed[described(mix)] = error
            return math.inf

    def best(self, share: float) -> str:
        """Name of the mix for a share of the parameters that costs least."""
        costs = {name: self.cost(mix) for name, mix in self.candidates.mixes(share).items()}
        best = min(costs, key=lambda name: costs[name])
        if costs[best] < math.inf or not self.failed:
            return best
        first, *others = self.failed.values()
        if not others:
            raise first
        raise InputError("; ".join(f"{name}: {reason}" for name, reason in self.failed.items()), hint=first.hint)

    def smallest(self, max_loss: float) -> Mix:
        """The smallest mix, of the sort that is best at one size, whose loss is within a bound; by bisection.

        Raises
        ------
        UnreachableError
            If the one that removes least is not.
        """
        shares = self.candidates.shares
        at = min(range(len(shares)), key=lambda i: abs(shares[i] - COMPARED_AT))
        sort = self.best(shares[at])

        def of(share: float) -> Mix:
            found = self.candidates.mixes(share)
            return found.get(sort) or next(iter(found.values()))

        def holds(share: float) -> bool:
            return self.cost(of(share)) <= (1 + max_loss) * self.dense

        low, high = 0, len(shares)  # Those from ``high`` on hold.
        while low < high:
            low, high = (low, at) if holds(shares[at]) else (at + 1, high)
            at = (low + high) // 2
        if high == len(shares):
            last = of(shares[-1])
            failure = self.failed.get(described(last))
            why = failure or f"the loss is {self.measure(last) / self.dense - 1:.4g} on held-out text"
            raise UnreachableError(
                f"no model with at most {shares[-1]:.0%} of the parameters outside the embeddings keeps to --max-loss"
                f" {max_loss:g}: {why}",
                hint="choose a larger --max-loss",
            )
        return of(shares[high])


def choose_passes(
    model: Any, tokenizer: Any, candidates: Candidates, text: str, measured: Measured, **how: Any
) -> tuple[list[Recipe], Choice]:
    """Compare what reaches a target; the recipes to prune by, in order, and the choice.

    Parameters
    ----------
    model, tokenizer, candidates, text, measured
        See :class:`Comparison`; options too.
    """
    started, target = time.perf_counter(), candidates.target
    nbytes = sum(p.nbytes for p in model.parameters())
    check_memory(nbytes, model.device, "a copy of the model, from which candidates are removed")
    compared = Comparison(model, tokenizer, candidates, text, measured, **how)
    if target.target_params is not None:
        mix = candidates.mixes(target.target_params)[compared.best(target.target_params)]
    else:
        mix = compared.smallest(target.max_loss or 0.0)
    count, seqlen = compared.windows.shape
    size: dict[str, Any] = {"windows": count, "seqlen": seqlen, "seconds": round(time.perf_counter() - started, 3)}
    choice = candidates.result(mix, perplexity=compared.found, dense=compared.dense, **size)
    failed = {name: str(error) for name, error in compared.failed.items()}
    return passes(mix, candidates.recipe), replace(choice, left_out=choice.left_out | failed)


def check_whole(model: StreamedModel) -> tuple[list[str], WeightSource | None]:
    """Refuse a model that does not fit into memory as a whole, and release its weights.

    Returns notes on what such a run does not save, and the layout of the checkpoint if it is not that of the model.
    """
    check_memory(sum(map(model.bytes, model.units)), model.device, "the whole model")
    notes, layout = Names.of(model, smaller=True).left_out(), model.layout
    model.release()
    return notes, layout if isinstance(layout, ConvertedWeights) else None


def checked_size(choice: Choice, model: Any, candidates: Candidates | None) -> Choice:
    """The choice with the number of parameters that stayed; raises InputError if they are more than asked for."""
    if candidates is None:
        return choice
    kept, share = outside_embeddings(model), candidates.target.target_params
    if share is not None and kept > share * choice.parameters:
        raise InputError(f"{kept:,} parameters stayed, more than {share:.2%} of {choice.parameters:,}")
    return replace(choice, kept=kept)
