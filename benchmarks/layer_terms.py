"""Which score of layers as terms tells best what can go: TF (block influence), TF times IDF, DF or IDF.

    python benchmarks/layer_terms.py --calibrate valid-head.txt --choose valid-tail.txt --out out/layer_terms.jsonl

The signal of a layer at a token is how far it turns the hidden state. Groups are documents (calibration sequences) or
topics of the signal. The layers with the lowest score go, without and with an update; perplexity is on ``--choose``,
which must not be the text that results are reported on. Cells that are there are not measured again.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from cells import add_cell, read_cells, setup_of
from numpy.typing import NDArray

from neuronrank_core import Recipe
from neuronrank_core.selection.patterns import exact_ratio
from neuronrank_core.statistics import tfidf
from neuronrank_core.statistics.topics import topics
from neuronrank_torch.calibration.layerwise import split_output
from neuronrank_torch.evaluation.perplexity import evaluate
from neuronrank_torch.kernels import layer_signal
from neuronrank_torch.model.open import load_model
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.progress import silent
from neuronrank_torch.pruning.whole_layers import LayerRemoval
from neuronrank_torch.text.sequences import calibration_sequences
from neuronrank_torch.text.sources import load_text

#: Of the signal: where a term is active, as for neurons; and the number of topics.
Q, TOPICS = 0.6, 16


@torch.inference_mode()
def signals(model: Any, sequences: torch.Tensor) -> NDArray[np.float64]:
    """Signal of every layer at every token, shape (documents, tokens, layers)."""
    seen: list[torch.Tensor] = []
    for layer in find_decoder(model).layers:
        layer.module.register_forward_hook(
            lambda _, args, out: seen.append(layer_signal(args[0][0].float(), split_output(out)[0][0].float()))
        )
    for sequence in sequences:
        model(input_ids=sequence[None], use_cache=False, logits_to_keep=1)
    return torch.stack(seen).reshape(len(sequences), -1, sequences.shape[1]).transpose(1, 2).double().numpy()


def scores(signal: NDArray[np.float64], seed: int) -> dict[str, NDArray[np.float64]]:
    """The scores of the layers by name; the lowest go."""
    documents, tokens, layers = signal.shape
    flat = signal.reshape(-1, layers)
    tau = tfidf.quantile_threshold(flat, Q)
    labels = {"documents": np.repeat(np.arange(documents), tokens), "topics": topics(flat, TOPICS, seed)}
    tf = tfidf.term_frequency(signal.mean(axis=1), np.full(documents, tokens))
    found = {"TF": tf, "largest": flat.max(axis=0), "depth": np.arange(layers)[::-1].astype(float)}
    for name, label in labels.items():
        groups = int(label.max()) + 1
        active = tfidf.active_tokens(flat, tau, label, groups)
        df = tfidf.document_frequency(active, np.bincount(label, minlength=groups), Q)
        idf = tfidf.inverse_document_frequency(df, groups)
        found |= {f"TF x IDF, {name}": tf * idf, f"DF, {name}": df + tf / tf.max() / 2, f"IDF, {name}": idf + tf / 1e6}
    return found


@click.command(context_settings={"show_default": True})
@click.option("--model", default="builtin:smollm2-135m")
@click.option("--calibrate", required=True, help="Calibration text.")
@click.option("--choose", required=True, help="Text that the scores are compared on.")
@click.option("--remove", "removed", multiple=True, type=int, default=(3, 6), help="Number of layers.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,))
@click.option("--nsamples", default=16)
@click.option("--seqlen", default=512)
@click.option("--windows", default=12)
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/layer_terms.jsonl"))
def main(
    model: str,
    calibrate: str,
    choose: str,
    removed: tuple[int, ...],
    seeds: tuple[int, ...],
    nsamples: int,
    seqlen: int,
    windows: int,
    out: Path,
) -> None:
    """Measure every cell that is not there yet."""
    dense, tokenizer, _ = load_model(model)
    texts = load_text(calibrate, "calibration"), load_text(choose, "evaluation")
    setup = setup_of(model, calibrate, choose, texts, nsamples, seqlen, windows)
    done = {(c["score"], c["removed"], c["update"], c["seed"]) for c in read_cells(out) if c["setup"] == setup}
    depth = len(find_decoder(dense).layers)
    for seed in seeds:
        kind: dict[str, Any] = {"sparsity_type": "layers-by-influence", "nsamples": nsamples, "seqlen": seqlen}
        sequences = calibration_sequences(tokenizer, Recipe(seed=seed, **kind), texts[0])
        by_name = scores(signals(copy.deepcopy(dense), sequences), seed)
        for goes, update, name in itertools.product(removed, ("none", "least-squares"), by_name):
            if (name, goes, update, seed) in done:
                continue
            model_ = copy.deepcopy(dense)
            recipe = Recipe(sparsity_ratio=exact_ratio(goes, depth), update=update, seed=seed, **kind)
            removal = LayerRemoval(model_, find_decoder(model_), recipe, sequences, 4, silent, lambda _, go: go())
            order = [int(layer) for layer in np.argsort(by_name[name], kind="stable")]
            removal._by_influence = lambda order=order: order  # type: ignore[method-assign,misc]
            with torch.no_grad():
                gone = [layer.layer for layer in removal.run() if layer.removed]
            value = evaluate(model_, tokenizer, texts[1], seqlen=seqlen, windows=windows).perplexity
            cell = {"score": name, "removed": goes, "update": update, "seed": seed, "gone": gone, "perplexity": value}
            add_cell(out, **cell, setup=setup)
            click.echo(f"{name}, {goes} layers, {update}, seed {seed}: {value:.2f} {gone}", err=True)


if __name__ == "__main__":
    main()
