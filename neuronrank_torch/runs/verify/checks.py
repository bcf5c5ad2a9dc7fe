"""Compares everything that follows from the activations of a layer: the core on float64 against torch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuronrank_core import LayerStatistics, NeuronStatistics, Recipe, ScoringContext, prune_mask
from neuronrank_core.kernels import Array
from neuronrank_core.methods import method_for, mode
from neuronrank_core.selection.patterns import comparison_group, select
from neuronrank_core.statistics.numpy_kernels import NumpyKernels
from neuronrank_core.statistics.table import sample_positions
from neuronrank_core.statistics.topics import topic_margins
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.runs.verify import contract
from neuronrank_torch.runs.verify.contract import Check
from neuronrank_torch.runs.verify.reference import Observed

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
    core = NeuronStatistics(reference, recipe, layer=observed.index, mode=mode(recipe))
    # Uses the labels of the reference, so that a near-tie between topics does not change the other quantities.
    torch_ = NeuronStatistics(ours, recipe, kernels, observed.index, core.labels, mode=mode(recipe))
    checks.append(contract.counts("df", torch_.df, core.df))
    checks += [contract.real(name, getattr(torch_, name), getattr(core, name)) for name in ("tf", "idf", "spikiness")]
    weights = observed.weights
    double = {name: weight.cpu().double().numpy() for name, weight in weights.items()}
    contexts = (
        ScoringContext(observed.index, recipe, weights, ours, kernels, known={mode(recipe): torch_}),
        ScoringContext(observed.index, recipe, double, reference, known={mode(recipe): core}),
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
