"""What TF, IDF, spikiness, the signal, q and K contribute, each alone and together, for weights and whole neurons.

    python benchmarks/study.py --calibrate valid-head.txt --choose valid-tail.txt --out out/study.jsonl

Every variant is a method with settings, masked in one go by statistics of the dense model, so that variants differ in
nothing else and cost no pass of their own. Masked models are measured in bfloat16, which is twice as fast and the same
for all. ``--choose`` must not be the text that results are reported on. Texts may be several:
``benchmarks/mixture.py`` makes prose, code and documentation. One line of JSON a cell; cells that are there are not
measured again.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from cells import add_cell, read_cells
from quality import recipe_for

from neuronrank_core import LayerStatistics, Recipe, ScoringContext
from neuronrank_core.selection.masks import prune_mask
from neuronrank_core.selection.whole_neurons import kept_neurons
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.layerwise import LayerRun, run_layers
from neuronrank_torch.evaluation.perplexity import evaluate
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.open import load_model
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.text.sequences import calibration_sequences
from neuronrank_torch.text.sources import load_text, text_fingerprint

MAIN, SEED = "neuronrank_wanda", "neuronrank_tfidf,signal=product"
#: Settings tried on top of the main method's defaults: strength^0.5, no IDF, no spikiness.
ALONE = (
    "",
    "tf_exp=0",
    "tf_exp=1",
    *(f"idf_exp={e},tfidf_mode={mode}" for mode in ("doc", "topic", "token") for e in (-0.5, 0.5)),
    *(f"idf_exp=0.5,tfidf_mode=topic,q_active={q}" for q in (0.3, 0.9)),
    *(f"idf_exp=0.5,tfidf_mode=topic,tfidf_k={k}" for k in (8, 256)),
    *(f"idf_exp=0.5,tfidf_mode=topic,signal={signal}" for signal in ("activated", "product")),
    *(f"spikiness_exp={e}" for e in (-0.3, 0.3)),
)
TOGETHER = (
    "tf_exp=0,idf_exp=0.5,tfidf_mode=doc",
    "tf_exp=0,idf_exp=0.5,tfidf_mode=topic",
    "tf_exp=0,spikiness_exp=0.3",
    "idf_exp=-0.5,tfidf_mode=topic,spikiness_exp=-0.3",
)
#: Settings on top of the seed formula without IDF.
OF_SEED = (
    "idf_exp=0",
    *(f"idf_exp=1,tfidf_mode={mode}" for mode in ("doc", "topic", "token")),
    "idf_exp=0,spikiness_exp=0.3",
    "idf_exp=0,signal=activated",
    "idf_exp=0,signal=gate",
)
VARIANTS = (
    *(",".join(filter(None, (MAIN, settings))) for settings in (*ALONE, *TOGETHER)),
    *(f"{SEED},{settings}" for settings in OF_SEED),
)


class Dense:
    """A dense model, its statistics by calibration seed and signal, and its masked copies."""

    def __init__(self, model: Any, tokenizer: Any, text: str) -> None:
        self.model, self.tokenizer, self.text = model, tokenizer, text
        self.layers = list(find_decoder(model).layers)
        self._tables: dict[tuple[int, str], list[LayerStatistics]] = {}

    def tables(self, recipe: Recipe) -> list[LayerStatistics]:
        """Statistics of every layer, with all columns."""
        key = recipe.seed, recipe.signal
        if key not in self._tables:
            self._tables = {known: tables for known, tables in self._tables.items() if known[0] == recipe.seed}
            everything = Recipe(
                method="neuronrank_tfidf",
                input_exp=1,
                spikiness_exp=1,
                signal=recipe.signal,
                seed=recipe.seed,
                nsamples=recipe.nsamples,
                seqlen=recipe.seqlen,
            )
            self._tables[key] = list(self._collect(everything))
        return self._tables[key]

    def _collect(self, recipe: Recipe) -> list[LayerStatistics]:
        tables = []

        def visit(run: LayerRun) -> None:
            with LayerCollector(run.layer, run.layer.blocks(), recipe) as collector:
                run.feed(keep=True, after=lambda first: collector.add_documents(first, recipe.seqlen))
            tables.extend(collector.statistics())

        sequences = calibration_sequences(self.tokenizer, recipe, self.text)
        run_layers(find_decoder(self.model), sequences, visit, batch_size=4)
        return tables

    def masked(self, recipe: Recipe) -> Any:
        """A copy of the model with its lowest weights zeroed, or what its lowest neurons hand on."""
        pruned = copy.deepcopy(self.model)
        for layer, table in zip(find_decoder(pruned).layers, self.tables(recipe), strict=True):
            weights = layer.mlp.weights
            dense = {name: weight.clone() for name, weight in weights.items()}
            context = ScoringContext(layer.index, recipe, dense, table, TorchKernels())
            if recipe.whole_neurons:
                gone = torch.ones(weights["gate_proj"].shape[0], dtype=torch.bool)
                gone[torch.as_tensor(kept_neurons(context))] = False
                weights["down_proj"][:, gone] = 0
                continue
            for name, weight in weights.items():
                weight[prune_mask(name, context)] = 0
        return pruned


def markdown(cells: list[dict[str, Any]]) -> str:
    """One table per setup and sparsity: each variant's difference from the first, paired by seed, mean and range."""
    lines = []
    for setup, group in itertools.groupby(cells, key=lambda cell: json.dumps(cell["setup"], sort_keys=True)):
        measured = list(group)
        lines += ["", ", ".join(f"{key} {value}" for key, value in json.loads(setup).items())]
        for sparsity in dict.fromkeys(cell["sparsity"] for cell in measured):
            of = {(c["variant"], c["seed"]): c["perplexity"] for c in measured if c["sparsity"] == sparsity}
            texts = list(next(iter(of.values())))
            variants = list(dict.fromkeys(variant for variant, _ in of))
            lines += ["", f"| {sparsity} | " + " | ".join(texts) + " |", "| --- " * (len(texts) + 1) + "|"]
            for variant in variants:
                seeds = [seed for v, seed in of if v == variant]
                row = [_cell(of, variant, variants[0], seeds, text) for text in texts]
                lines.append(f"| `{variant}` | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _cell(of: dict[tuple[str, int], dict[str, float]], variant: str, base: str, seeds: list[int], text: str) -> str:
    mean = sum(of[variant, seed][text] for seed in seeds) / len(seeds)
    paired = [of[variant, seed][text] - of[base, seed][text] for seed in seeds if (base, seed) in of]
    if variant == base or not paired:
        return f"{mean:.2f}"
    return f"{mean:.2f}: {sum(paired) / len(paired):+.2f} ({min(paired):+.2f} to {max(paired):+.2f})"


def cells_left(
    done: list[dict[str, Any]], seeds: tuple[int, ...], sparsities: tuple[str, ...], variants: tuple[str, ...]
) -> Iterator[tuple[int, str, str]]:
    """Cells that are not there yet, seed by seed, as statistics are kept for one seed at a time."""
    known = {(cell["seed"], cell["sparsity"], cell["variant"]) for cell in done}
    yield from (cell for cell in itertools.product(seeds, sparsities, variants) if cell not in known)


@click.command(context_settings={"show_default": True})
@click.option("--model", default="builtin:smollm2-135m")
@click.option("--calibrate", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--choose", "choose", required=True, multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--variant", "variants", multiple=True, default=VARIANTS)
@click.option("--sparsity", "sparsities", multiple=True, default=("0.5", "neurons:0.2"))
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2))
@click.option("--nsamples", default=32)
@click.option("--seqlen", default=512)
@click.option("--windows", default=16)
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/study.jsonl"))
@click.option("--table-only", is_flag=True)
def main(
    model: str,
    calibrate: Path,
    choose: tuple[Path, ...],
    variants: tuple[str, ...],
    sparsities: tuple[str, ...],
    seeds: tuple[int, ...],
    nsamples: int,
    seqlen: int,
    windows: int,
    out: Path,
    table_only: bool,
) -> None:
    """Measure every cell that is not there yet, then print the tables."""
    if table_only:
        click.echo(markdown(read_cells(out)))
        return
    loaded, tokenizer, _ = load_model(model)
    text = load_text(str(calibrate), "calibration")
    texts = {path.stem: load_text(str(path), "evaluation") for path in choose}
    setup = {
        "model": model,
        "calibrated on": f"{calibrate.name} {text_fingerprint(text)[:8]}, {nsamples} x {seqlen}",
        "chosen on": f"{', '.join(f'{k} {text_fingerprint(v)[:8]}' for k, v in texts.items())}, {windows} x {seqlen}",
        "propagate": "dense",
        "measured in": "bfloat16",
        **versions(),
    }
    done = [cell for cell in read_cells(out) if cell["setup"] == setup]
    dense = Dense(loaded, tokenizer, text)
    with torch.no_grad():
        for seed, sparsity, variant in cells_left(done, seeds, sparsities, variants):
            recipe = recipe_for(variant, sparsity, "none", seed, nsamples=nsamples, seqlen=seqlen)
            pruned = dense.masked(recipe).to(torch.bfloat16)
            perplexity = {
                name: evaluate(pruned, tokenizer, chosen, seqlen=seqlen, windows=windows, batch_size=4).perplexity
                for name, chosen in texts.items()
            }
            cell = {"variant": variant, "sparsity": sparsity, "seed": seed, "perplexity": perplexity}
            add_cell(out, setup=setup, **cell)
            click.echo(f"{seed} {sparsity} {variant}: {perplexity}", err=True)
    click.echo(markdown(read_cells(out)))


if __name__ == "__main__":
    main()
