"""The equivalence contract on a user's own model, device and text: the core in NumPy against torch, layer by layer.

Each layer runs once, dense, on the device. Of the very activations that torch saw there the core makes a table of
statistics in float64; the other table is :class:`LayerCollector`'s. From either table follow TF, DF, IDF, spikiness,
scores and masks: once by the core's kernels on float64 weights, once by torch's on the device. The forward pass itself
is not compared; what half precision changes in it is told apart, by a second run of the model in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neuronrank_core import LayerStatistics, NeuronStatistics, Recipe, ScoringContext, document_statistics, merge
from neuronrank_core.kernels import Array, NumpyKernels
from neuronrank_core.kmeans import topic_margins
from neuronrank_core.masking import method_for, prune_mask
from neuronrank_core.selection import comparison_group, select
from neuronrank_torch import contract, corpus
from neuronrank_torch.architecture import activation_of, find_decoder, prunable_linears
from neuronrank_torch.collector import LayerCollector
from neuronrank_torch.contract import Check
from neuronrank_torch.executor import LayerRun, run_layers
from neuronrank_torch.job import OnStage, choose_device
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.models import Dtype, load_model
from neuronrank_torch.pipeline import calibration_sequences
from neuronrank_torch.report import versions

#: A score that every kernel of a backend and every kind of statistics enters.
EVERYTHING = Recipe(method="neuronrank_wanda", tfidf_mode="topic", idf_exp=1.0, spikiness_exp=1.0)
#: Columns that say what a row of the table is about.
_KEYS = ("document", "tokens", "sample_tokens")

#: The collector's table of a layer, and the masks that follow by the default method, as packed bits.
Outcome = tuple[LayerStatistics, dict[str, NDArray[np.uint8]]]


@dataclass(frozen=True)
class Observed:
    """A layer after its run: its linear layers, the collector's table and the core's."""

    index: int
    linears: dict[str, nn.Linear]
    table: LayerStatistics
    reference: LayerStatistics

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights in the precision that torch scores in."""
        return {name: linear.weight.detach().float() for name, linear in self.linears.items()}

    @property
    def kernels(self) -> TorchKernels:
        """Torch's, on the device of the weights."""
        return TorchKernels(self.linears["gate_proj"].weight.device)


@contextmanager
def witness(linears: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Keep what the modules of a gated MLP saw last: ``x``, ``gate`` and ``product``."""
    seen: dict[str, Tensor] = {}

    def gate(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        del module
        seen.update(x=args[0], gate=output)

    def product(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        del module
        seen.update(product=args[0])

    hooks = [
        linears["gate_proj"].register_forward_hook(gate),
        linears["down_proj"].register_forward_pre_hook(product),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def core_rows(seen: dict[str, Tensor], first: int, recipe: Recipe, layer: int) -> Iterator[LayerStatistics]:
    """The core's rows of the documents of a micro-batch, whose first has the number ``first``."""
    arrays = {name: tensor.cpu().double().numpy() for name, tensor in seen.items()}
    for i, gate in enumerate(arrays["gate"]):
        yield document_statistics(
            first + i,
            signal=abs(gate),
            gate=gate,
            inputs={"gate_proj": arrays["x"][i], "down_proj": arrays["product"][i]},
            threshold=recipe.threshold,
            tokens_per_document=recipe.tokens_per_document,
            layer=layer,
        )


def observe(
    model: nn.Module, sequences: Tensor, recipe: Recipe, layers: int, batch_size: int, look: Callable[[Observed], None]
) -> None:
    """Run the first ``layers`` layers, dense, and look at each while its linear layers are there."""

    def visit(run: LayerRun) -> None:
        if run.index >= layers:
            return
        linears = prunable_linears(run.layer, run.index)
        rows: list[LayerStatistics] = []

        def batch_done(first: int) -> None:
            collector.add_documents(first, run.hidden.shape[1])
            rows.extend(core_rows(seen, first, recipe, run.index))

        activation = activation_of(run.layer, run.index)
        with LayerCollector(run.index, linears, activation, recipe) as collector, witness(linears) as seen:
            run.feed(keep=True, after=batch_done)
        look(Observed(run.index, linears, collector.statistics(), merge(rows)))

    with torch.no_grad():
        run_layers(find_decoder(model), sequences, visit, batch_size=batch_size)


def check_layer(observed: Observed, recipe: Recipe) -> list[Check]:
    """Hold everything that follows from a layer's activations against the core's."""
    ours, reference, kernels, k = observed.table, observed.reference, observed.kernels, recipe.tfidf_k
    theirs = reference.columns()
    checks = [
        (contract.counts if theirs[name].dtype == np.int64 else contract.real)(name, column, theirs[name])
        for name, column in ours.columns().items()
        if name not in _KEYS
    ]
    sample = np.asarray(reference.sample)
    clear = contract.clear_seed(sample, k, recipe.seed)
    recipe = replace(recipe, seed=recipe.seed if clear is None else clear)
    topics = kernels.topics(np.asarray(ours.sample), k, recipe.seed), NumpyKernels.topics(sample, k, recipe.seed)
    margins = topic_margins(sample, k, recipe.seed)[1]
    checks.append(contract.topic_labels("topics", *topics, margins, clear=clear is not None))

    core = NeuronStatistics(reference, recipe, layer=observed.index)
    # By the reference's labels, so that a near-tie between topics is not found again in all that follows.
    torch_ = NeuronStatistics(ours, recipe, kernels, observed.index, core.labels)
    checks.append(contract.counts("df", torch_.df, core.df))
    checks += [contract.real(name, getattr(torch_, name), getattr(core, name)) for name in ("tf", "idf", "spikiness")]
    weights = observed.weights
    double = {name: weight.cpu().double().numpy() for name, weight in weights.items()}
    contexts = (
        ScoringContext(observed.index, recipe, weights, ours, kernels, torch_),
        ScoringContext(observed.index, recipe, double, reference, known=core),
    )
    for name in weights:
        checks += check_module(name, *contexts)
    return checks


def check_module(name: str, ours: ScoringContext, reference: ScoringContext) -> Iterator[Check]:
    """Hold a module's scores and mask against the core's."""
    method, ratio = method_for(name, ours.recipe), ours.recipe.ratio
    compare = method.compare(name)
    scores, theirs = method.score(name, ours), method.score(name, reference)
    yield contract.real(f"{name} scores", scores.cpu(), theirs)

    def chosen(score: Array, weight: Array, kernels: Any) -> Array:
        return select(score, weight, ratio=ratio, compare=compare, lowest_k=kernels.lowest_k, where=name)

    unequal = 0
    # Scores as they are, and rounded so that many tie.
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
    """What a run would make of a layer by the default method."""
    weights = observed.weights
    context = ScoringContext(observed.index, Recipe(), weights, observed.table, observed.kernels)
    return observed.table, {name: np.packbits(prune_mask(name, context).cpu().numpy()) for name in weights}


def cost(half: Outcome, full: Outcome) -> dict[str, float]:
    """What half precision changed: norm of a statistic's difference / its norm; share of a mask's bits that differ."""
    (a, a_masks), (b, b_masks) = ((table.columns(), masks) for table, masks in (half, full))
    norm = np.linalg.norm
    changed = {
        name: float(norm(np.float64(a[name]) - np.float64(b[name])) / (norm(np.float64(b[name])) or 1.0))
        for name in b.keys() - _KEYS
    }
    differ = {f"{name} mask": np.unpackbits(a_masks[name] ^ bits).mean() for name, bits in b_masks.items()}
    return changed | {name: float(share) for name, share in differ.items()}


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
    on_stage: OnStage = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Load a model and hold torch against the core on its first layers.

    Parameters
    ----------
    model, device, dtype
        As :func:`neuronrank_torch.models.load_model` takes them.
    dataset : str
        As :func:`neuronrank_torch.corpus.load_text` takes it.
    nsamples, seqlen : int
        Sequences, and tokens in each.
    layers : int, optional
        How many, from the first; all by default.
    batch_size : int
        Sequences in a micro-batch.
    seed : int
        Of the sequences, and of the topics where their clustering is clear of near-ties.
    on_stage : callable
        See :data:`neuronrank_torch.job.OnStage`.

    Returns
    -------
    dict
        ``holds``, the checks of each layer, and in half precision what it costs; all JSON can hold.

    Raises
    ------
    NeuronRankError
        If the model or the text cannot be used, or a number is NaN or Inf.
    """
    tokens = nsamples * min(seqlen, EVERYTHING.tokens_per_document)
    recipe = replace(EVERYTHING, nsamples=nsamples, seqlen=seqlen, seed=seed, tfidf_k=min(64, tokens))
    text = corpus.load_text(dataset, "calibration")
    target = choose_device(device)
    checked: list[list[Check]] = []
    outcomes: list[Outcome] = []
    costs: list[dict[str, float]] = []

    def run(precision: Dtype, stage: str, *looks: Callable[[Observed], None]) -> str:
        on_stage(f"loading {model}", 0, 1)
        loaded, tokenizer, _ = load_model(model, dtype=precision, device=target)
        total = len(find_decoder(loaded).layers[:layers])

        def look(observed: Observed) -> None:
            on_stage(f"{stage} {observed.index}", observed.index, total)
            for each in looks:
                each(observed)

        sequences = calibration_sequences(tokenizer, recipe, text).to(target)
        observe(loaded, sequences, recipe, total, batch_size, look)
        return str(next(loaded.parameters()).dtype).removeprefix("torch.")

    used = run(
        dtype,
        "verifying layer",
        lambda observed: checked.append(check_layer(observed, recipe)),
        lambda observed: outcomes.append(outcome(observed)),
    )
    if used != "float32":
        run(
            "float32",
            "float32, layer",
            lambda observed: costs.append(cost(outcomes[observed.index], outcome(observed))),
        )
    return {
        "model": model,
        "device": target,
        "dtype": used,
        **{"dataset": dataset, "nsamples": nsamples, "seqlen": seqlen, "seed": seed},
        "holds": all(check.holds for checks in checked for check in checks),
        "layers": [
            {"layer": i, "checks": {check.name: {**asdict(check), "holds": check.holds} for check in checks}}
            for i, checks in enumerate(checked)
        ],
        "cost": [{"layer": i, "changed": changed} for i, changed in enumerate(costs)],
        "versions": versions(),
    }
