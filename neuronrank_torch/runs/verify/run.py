"""Checks the equivalence contract on a user's own model, device and text: the NumPy core against torch, by layer.

Each layer runs once, dense, on the device. From the same activations, the core computes a table of statistics in
float64 and :class:`LayerCollector` computes the other one. TF, DF, IDF, spikiness, scores and masks follow from each
table: with the core's kernels on float64 weights, and with torch's on the device. The forward pass itself is not
compared. In half precision, a second run of the model in float32 shows how much the precision changes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from neuronrank_core import Recipe
from neuronrank_torch.model.device import choose_device
from neuronrank_torch.model.open import Dtype, load_model
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.runs.verify.checks import Outcome, check_layer, cost, outcome
from neuronrank_torch.runs.verify.contract import Check
from neuronrank_torch.runs.verify.reference import Observed, observe
from neuronrank_torch.runs.verify.verify_result import LayerChecks, LayerCost, VerifyResult
from neuronrank_torch.text.sequences import calibration_sequences
from neuronrank_torch.text.sources import read_documents

#: A score that uses every kernel of a backend and every kind of statistics.
EVERYTHING = Recipe(method="neuronrank_wanda", tfidf_mode="topic", idf_exp=1.0, spikiness_exp=1.0)


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
    documents, device = read_documents(dataset, "calibration"), choose_device(device)
    checked: list[list[Check]] = []
    outcomes: list[Outcome] = []
    costs: list[dict[str, float]] = []

    def check(observed: Observed) -> None:
        checked.append(check_layer(observed, recipe))
        if observed.dtype != torch.float32:
            outcomes.append(outcome(observed))

    def compare(observed: Observed) -> None:
        costs.append(cost(outcomes[observed.index], outcome(observed)))

    def observe_layers(precision: Dtype, stage: str, look: Callable[[Observed], None]) -> tuple[str, tuple[str, ...]]:
        """Load the model, and show ``look`` every layer after it has run; returns the model's precision, and notes."""
        progress(f"loading {model}", 0, 1, "models")
        loaded, tokenizer, source = load_model(model, dtype=precision, device=device)
        total = len(find_decoder(loaded).layers[:layers])

        def each(observed: Observed) -> None:
            progress(f"{stage} layer {observed.index + 1} of {total}", observed.index, total, "layers")
            look(observed)

        sequences = calibration_sequences(tokenizer, recipe, documents.text(tokenizer)).to(device)
        observe(loaded, sequences, recipe, layers=total, batch_size=batch_size, look=each)
        return str(next(loaded.parameters()).dtype).removeprefix("torch."), source.notes

    used, notes = observe_layers(dtype, "verifying", check)
    if outcomes:
        observe_layers("float32", "comparing with float32:", compare)
    return VerifyResult(
        model=model,
        device=device,
        dtype=used,
        dataset=dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        holds=all(check.holds for checks in checked for check in checks),
        layers=tuple(LayerChecks(i, {check.name: check for check in checks}) for i, checks in enumerate(checked)),
        cost=tuple(LayerCost(i, changed) for i, changed in enumerate(costs)),
        versions=versions(),
        notes=notes,
    )
