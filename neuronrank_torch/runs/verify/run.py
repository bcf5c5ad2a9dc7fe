"""Checks the equivalence contract on a user's own model, device and text: the NumPy core against torch, by layer.

Each layer runs once, dense, on the device. From the same activations, the core computes a table of statistics in
float64 and :class:`LayerCollector` computes the other one. TF, DF, IDF, spikiness, scores and masks follow from each
table: with the core's kernels on float64 weights, and with torch's on the device. The forward pass itself is not
compared. In half precision, a second run of the model in float32 shows how much the precision changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neuronrank_core import LayerStatistics, NeuronStatistics, Recipe, ScoringContext
from neuronrank_core.kernels import Array
from neuronrank_core.selection.masks import method_for, prune_mask
from neuronrank_core.selection.patterns import comparison_group, select
from neuronrank_core.statistics.numpy_kernels import NumpyKernels
from neuronrank_core.statistics.table import sample_positions
from neuronrank_core.statistics.topics import topic_margins
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.device import choose_device
from neuronrank_torch.model.open import Dtype, load_model
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.runs.verify import contract
from neuronrank_torch.runs.verify.contract import Check
from neuronrank_torch.runs.verify.reference import Observed, observe
from neuronrank_torch.text.sequences import calibration_sequences
from neuronrank_torch.text.sources import load_text

#: A score that uses every kernel of a backend and every kind of statistics.
EVERYTHING = Recipe(method="neuronrank_wanda", tfidf_mode="topic", idf_exp=1.0, spikiness_exp=1.0)
#: Largest number of sampled tokens to compare topics on. With more, some choice is always a near-tie.
CLUSTERED = 256
#: Columns that identify a row of the table.
_KEYS = ("document", "tokens", "sample_tokens")
#: The collector's table of a layer, and the masks of the default method, as packed bits.
Outcome = tuple[LayerStatistics, dict[str, NDArray[np.uint8]]]


def check_layer(observed: Observed, recipe: Recipe) -> list[Check]:
    """Compare everything computed from a layer's activations with the core."""
    ours, reference, kernels = observed.table, observed.reference, observed.kernels
    theirs = reference.columns()
    checks = [
        (contract.counts if theirs[name].dtype == np.int64 else contract.real)(name, column, theirs[name])
        for name, column in ours.columns().items()
        if name not in _KEYS
    ]
    checks.append(check_topics(np.asarray(ours.sample), np.asarray(reference.sample), kernels, recipe))
    core = NeuronStatistics(reference, recipe, layer=observed.index)
    # Uses the labels of the reference, so that a near-tie between topics does not change the other quantities.
    torch_ = NeuronStatistics(ours, recipe, kernels, observed.index, core.labels)
    checks.append(contract.counts("df", torch_.df, core.df))
    checks += [contract.real(name, getattr(torch_, name), getattr(core, name)) for name in ("tf", "idf", "spikiness")]
    weights = observed.weights
    double = {name: weight.cpu().double().numpy() for name, weight in weights.items()}
    contexts = (
        ScoringContext(observed.index, recipe, weights, ours, kernels, known=torch_),
        ScoringContext(observed.index, recipe, double, reference, known=core),
    )
    for name in weights:
        checks += check_module(name, *contexts)
    return checks


def check_topics(
    ours: NDArray[np.float32], reference: NDArray[np.float32], kernels: TorchKernels, recipe: Recipe
) -> Check:
    """Compare topics with the core, on few enough tokens that a clustering without near-ties can be found."""
    kept, k = sample_positions(len(reference), CLUSTERED), recipe.tfidf_k
    sample = reference[kept]
    clear = contract.clear_seed(sample, k, recipe.seed)
    seed = recipe.seed if clear is None else clear
    return contract.topic_labels(
        "topics",
        kernels.topics(ours[kept], k, seed),
        NumpyKernels.topics(sample, k, seed),
        topic_margins(sample, k, seed)[1],
        clear=clear is not None,
    )


def check_module(name: str, ours: ScoringContext, reference: ScoringContext) -> Iterator[Check]:
    """Compare a module's scores and mask with the core."""
    method, ratio = method_for(name, ours.recipe), ours.recipe.ratio
    compare = method.compare(name)
    scores, theirs = method.score(name, ours), method.score(name, reference)
    yield contract.real(f"{name} scores", scores.cpu(), theirs)

    def chosen(score: Array, weight: Array, kernels: Any) -> Array:
        return select(score, weight, ratio=ratio, compare=compare, lowest_k=kernels.lowest_k, where=name)

    unequal = 0
    # Scores as they are, and rounded so that there are many ties.
    for equal in (scores, scores.bfloat16().float()):
        same = chosen(equal.cpu().numpy().copy(), ours.weights[name].cpu().numpy(), NumpyKernels())
        unequal += int((chosen(equal.clone(), ours.weights[name], ours.kernels).cpu().numpy() != same).sum())
    yield contract.masks(
        f"{name} mask",
        prune_mask(name, ours).cpu().numpy(),
        prune_mask(name, reference),
        theirs,
        group=comparison_group(theirs.shape, ratio=ratio, compare=compare)[0],
        unequal=unequal,
    )


def outcome(observed: Observed) -> Outcome:
    """Statistics and masks of a layer under the default method."""
    weights = observed.weights
    context = ScoringContext(observed.index, Recipe(), weights, observed.table, observed.kernels)
    return observed.table, {name: np.packbits(prune_mask(name, context).cpu().numpy()) for name in weights}


def cost(half: Outcome, full: Outcome) -> dict[str, float]:
    """Effect of half precision: relative norm of the difference of a statistic; fraction of mask bits that differ."""
    (a, a_masks), (b, b_masks) = ((table.columns(), masks) for table, masks in (half, full))
    norm = np.linalg.norm
    changed = {
        name: float(norm(np.float64(a[name]) - np.float64(b[name])) / (norm(np.float64(b[name])) or 1.0))
        for name in b.keys() - _KEYS
    }
    differ = {f"{name} mask": np.unpackbits(a_masks[name] ^ bits).mean() for name, bits in b_masks.items()}
    return changed | {name: float(share) for name, share in differ.items()}


@dataclass(frozen=True)
class LayerChecks:
    """The checks of one layer.

    Parameters
    ----------
    layer : int
        Number of the layer, from 0.
    checks : dict of Check
        By quantity.
    """

    layer: int
    checks: dict[str, Check]


@dataclass(frozen=True)
class LayerCost:
    """How much half precision changes one layer, compared with float32.

    Parameters
    ----------
    layer : int
        Number of the layer, from 0.
    changed : dict of float
        By quantity: relative norm of the difference of a statistic, or fraction of the bits of a mask that differ.
    """

    layer: int
    changed: dict[str, float]


@dataclass(frozen=True)
class VerifyResult:
    """Result of ``neuronrank verify``.

    Parameters
    ----------
    model : str
        The model, as it was named.
    device : str
        Device that torch ran on.
    dtype : str
        Precision of the model.
    dataset : str
        The text, as it was named.
    nsamples : int
        Number of sequences.
    seqlen : int
        Tokens per sequence.
    seed : int
        Seed of every random number.
    holds : bool
        Whether all checks hold.
    layers : tuple of LayerChecks
    cost : tuple of LayerCost
        Empty in float32.
    versions : dict of str
        Version of each package that influences the result.
    schema : int
        Version of this format.
    """

    model: str
    device: str
    dtype: str
    dataset: str
    nsamples: int
    seqlen: int
    seed: int
    holds: bool
    layers: tuple[LayerChecks, ...]
    cost: tuple[LayerCost, ...]
    versions: dict[str, str]
    schema: int = 1


def run_verify(
    model: str,
    *,
    dataset: str = "builtin",
    nsamples: int = 4,
    seqlen: int = 128,
    layers: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype = "auto",
    progress: Progress = silent,
) -> VerifyResult:
    """Load a model and compare torch with the core on its first layers.

    Parameters
    ----------
    model, device, dtype
        As :func:`neuronrank_torch.model.open.load_model` takes them.
    dataset : str
        As :func:`neuronrank_torch.text.sources.load_text` takes it.
    nsamples, seqlen : int
        Number of sequences, and tokens per sequence.
    layers : int, optional
        Number of layers, from the first; all by default.
    batch_size : int
        Sequences in a micro-batch.
    seed : int
        Of the sequences, and of the topics if their clustering is free of near-ties.
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`.

    Returns
    -------
    VerifyResult

    Raises
    ------
    NeuronRankError
        If the model or the text cannot be used, or a number is NaN or Inf.
    """
    tokens = nsamples * min(seqlen, EVERYTHING.tokens_per_document)
    recipe = replace(EVERYTHING, nsamples=nsamples, seqlen=seqlen, seed=seed, tfidf_k=min(64, tokens))
    text = load_text(dataset, "calibration")
    target = choose_device(device)
    checked: list[list[Check]] = []
    outcomes: list[Outcome] = []
    costs: list[dict[str, float]] = []

    def check(observed: Observed) -> None:
        checked.append(check_layer(observed, recipe))
        if observed.dtype != torch.float32:
            outcomes.append(outcome(observed))

    def compare(observed: Observed) -> None:
        costs.append(cost(outcomes[observed.index], outcome(observed)))

    def run(precision: Dtype, stage: str, look: Callable[[Observed], None]) -> str:
        progress(f"loading {model}", 0, 1, "models")
        loaded, tokenizer, _ = load_model(model, dtype=precision, device=target)
        total = len(find_decoder(loaded).layers[:layers])

        def each(observed: Observed) -> None:
            done = observed.index + 1
            progress(f"{stage} layer {done} of {total}", observed.index, total, "layers")
            look(observed)

        sequences = calibration_sequences(tokenizer, recipe, text).to(target)
        observe(loaded, sequences, recipe, layers=total, batch_size=batch_size, look=each)
        return str(next(loaded.parameters()).dtype).removeprefix("torch.")

    used = run(dtype, "verifying", check)
    if outcomes:
        run("float32", "comparing with float32:", compare)
    return VerifyResult(
        model=model,
        device=target,
        dtype=used,
        dataset=dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        holds=all(check.holds for checks in checked for check in checks),
        layers=tuple(LayerChecks(i, {check.name: check for check in checks}) for i, checks in enumerate(checked)),
        cost=tuple(LayerCost(i, changed) for i, changed in enumerate(costs)),
        versions=versions(),
    )
