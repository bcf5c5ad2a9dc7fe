"""Perplexity per kind of text after removing experts, by method and by the kinds of text in the calibration.

    python benchmarks/expert_removal.py --model out/grown --texts out/grown/texts --out out/experts.jsonl

``--texts`` is a folder with ``KIND-train.txt`` to calibrate on and ``KIND-held.txt`` to measure on, as
``grow_mixture.py`` writes it. ``--mix`` gives the kinds and their shares of the calibration text. One line of JSON a
cell; cells that are there are not measured again. All layers are pruned by statistics of the dense model, collected
once for every mix and seed. Besides perplexity a cell has, for every kind, how many of its specialists were kept:
experts with at least half of their tokens from this kind, where each kind has as many tokens.
"""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from cells import add_cell, read_cells
from quality import recipe_for

from neuronrank_core import LayerStatistics, Recipe
from neuronrank_core.selection.experts import kept_experts
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.layerwise import LayerRun, run_layers
from neuronrank_torch.evaluation.perplexity import evaluate
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.mixture import Mixture
from neuronrank_torch.model.open import load_model
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.pruning.layer import LayerPlan
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.text.sequences import calibration_sequences, evaluation_windows

METHODS = (
    "random",
    "expert_frequency",
    "reap",
    "neuronrank_tfidf,tfidf_mode=doc",
    "neuronrank_tfidf,tfidf_mode=topic",
    "neuronrank_tfidf,tfidf_mode=doc,idf_exp=0,signal=product",
    "neuronrank_tfidf,tfidf_mode=doc,signal=product",
    "neuronrank_tfidf,tfidf_mode=topic,idf_exp=0,signal=product",
    "neuronrank_tfidf,tfidf_mode=topic,signal=product",
)
MIXES = ("prose=1", "prose=1,code=1,docs=1", "prose=18,code=1,docs=1")
#: Share of an expert's tokens from which on it is a specialist.
SPECIALIST = 0.5


def texts_of(folder: Path, part: str) -> dict[str, str]:
    """The texts of a part, ``train`` or ``held``, by their kind."""
    ending = f"-{part}.txt"
    return {path.name.removesuffix(ending): path.read_text() for path in sorted(folder.glob(f"*{ending}"))}


def mixed(texts: dict[str, str], mix: str) -> str:
    """Text with the given shares of the kinds, as long as the shortest kind allows."""
    shares = {kind: float(share) for kind, share in (part.split("=") for part in mix.split(","))}
    unit = min(len(texts[kind]) / share for kind, share in shares.items())
    return "\n\n".join(texts[kind][: int(share * unit)] for kind, share in shares.items())


class Dense:
    """A dense model and, for each calibration text and seed, its statistics and its copies with fewer experts."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._key: Any = None
        self._tables: list[LayerStatistics | None] = []

    def tables(self, recipe: Recipe, text: str) -> list[LayerStatistics | None]:
        """Statistics of every layer, with all columns."""
        key = recipe.seed, text
        if key != self._key:
            self._key, self._tables = key, []
            everything = replace(recipe, method="neuronrank_tfidf", tfidf_mode="topic", idf_exp=1)

            def visit(run: LayerRun) -> None:
                with LayerCollector(run.layer, [Mixture.of(run.layer)], everything, recipe.seqlen) as collector:
                    run.feed(keep=True, after=lambda first: collector.add_documents(first, recipe.seqlen))
                self._tables.extend(collector.statistics())

            sequences = calibration_sequences(self.tokenizer, recipe, text)
            run_layers(find_decoder(self.model), sequences, visit, batch_size=4)
        return self._tables

    def pruned(self, recipe: Recipe, text: str) -> tuple[Any, list[list[int]]]:
        """A copy without its lowest-scoring experts, and the indices of the others in each layer."""
        copied, kept = copy.deepcopy(self.model), []
        plan = LayerPlan(recipe, TorchKernels())
        for layer, table in zip(find_decoder(copied).layers, self.tables(recipe, text), strict=True):
            mixture = Mixture.of(layer)
            kept.append(kept_experts(plan.context(mixture, table)).tolist())
            mixture.remove_experts(torch.as_tensor(kept[-1]))
        return copied, kept

    def shares(self, windows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The share that each kind has in the tokens of each expert, (layers, experts); as many tokens of each kind."""
        layers, counts = find_decoder(self.model).layers, []
        for ids in windows.values():
            seen = [torch.zeros(layer.experts.count) for layer in layers]
            hooks = [
                layer.experts.on_routed(lambda _, hits, row=row: row.add_(hits.sum(1)))
                for layer, row in zip(layers, seen, strict=True)
            ]
            for batch in ids.split(4):
                self.model.model(batch)
            for hook in hooks:
                hook.remove()
            counts.append(torch.stack(seen))
        total = torch.stack(counts).sum(0).clamp(min=1)
        return dict(zip(windows, (count / total for count in counts), strict=True))


def kept_specialists(shares: dict[str, torch.Tensor], kept: list[list[int]]) -> dict[str, list[int]]:
    """For every kind, how many of its specialists are kept, and how many there are."""
    found = {}
    for kind, share in shares.items():
        special = share >= SPECIALIST
        found[kind] = [sum(int(row[k].sum()) for row, k in zip(special, kept, strict=True)), int(special.sum())]
    return found


def markdown(cells: list[dict[str, Any]]) -> str:
    """A table per setup, mix and ratio: for each method mean and range over seeds, and the specialists kept."""
    lines = []
    for setup, group in itertools.groupby(cells, key=lambda cell: json.dumps(cell["setup"], sort_keys=True)):
        measured = list(group)
        kinds = list(measured[0]["perplexity"])
        lines += ["", ", ".join(f"{key} {value}" for key, value in json.loads(setup).items())]
        for mix, ratio in dict.fromkeys((cell["mix"], cell["ratio"]) for cell in measured):
            here = [cell for cell in measured if (cell["mix"], cell["ratio"]) == (mix, ratio)]
            header = f"| {mix}, {ratio} | " + " | ".join(kinds) + " | specialists kept |"
            lines += ["", header, "| --- " * (len(kinds) + 2) + "|"]
            for method in dict.fromkeys(cell["method"] for cell in here):
                of = [cell for cell in here if cell["method"] == method]
                row = [_values([cell["perplexity"][kind] for cell in of]) for kind in kinds]
                special = [
                    f"{sum(c['specialists'][k][0] for c in of) / len(of):.1f}/{total}"
                    for k, (_, total) in of[0]["specialists"].items()
                ]
                lines.append(f"| `{method}` | " + " | ".join(row) + f" | {', '.join(special)} |")
    return "\n".join(lines)


def _values(of: list[float]) -> str:
    mean = f"{sum(of) / len(of):.1f}"
    return mean if min(of) == max(of) else f"{mean} ({min(of):.1f} to {max(of):.1f})"


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True)
@click.option("--texts", "folder", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--mix", "mixes", multiple=True, default=MIXES)
@click.option("--method", "methods", multiple=True, default=METHODS, help="May carry settings: name,key=value.")
@click.option("--ratio", "ratios", multiple=True, type=float, default=(0.25, 0.5))
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2))
@click.option("--nsamples", default=64)
@click.option("--seqlen", default=256)
@click.option("--windows", default=16)
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/experts.jsonl"))
@click.option("--table-only", is_flag=True)
@torch.no_grad()
def main(
    model: str,
    folder: Path,
    mixes: tuple[str, ...],
    methods: tuple[str, ...],
    ratios: tuple[float, ...],
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
    dense = Dense(loaded, tokenizer)
    texts, held = (texts_of(folder, part) for part in ("train", "held"))
    setup = {"model": Path(model).name, "calibrated on": f"{nsamples} x {seqlen}", "propagate": "dense"}
    setup |= {"measured on": f"{windows} x {seqlen}", **versions()}

    def perplexities(measured: Any) -> dict[str, float]:
        run = {"seqlen": seqlen, "windows": windows, "batch_size": 4}
        return {kind: evaluate(measured, tokenizer, text, **run).perplexity for kind, text in held.items()}

    cells = [cell for cell in read_cells(out) if cell["setup"] == setup]
    done = {key_of(cell) for cell in cells}
    if ("dense", "none", 0.0, 0) not in done:
        cell = {"method": "dense", "mix": "none", "ratio": 0.0, "seed": 0, "perplexity": perplexities(loaded)}
        add_cell(out, setup=setup, **cell, specialists={}, kept=[])
    measured = {json.dumps(cell["kept"]): cell["perplexity"] for cell in cells}
    cut = {"seqlen": seqlen, "windows": windows, "bos_mode": "window"}
    shares = dense.shares(
        {kind: torch.as_tensor(evaluation_windows(tokenizer, text, **cut)) for kind, text in held.items()}
    )
    for seed, mix, ratio, method in itertools.product(seeds, mixes, ratios, methods):
        cell = {"method": method, "mix": mix, "ratio": ratio, "seed": seed}
        if key_of(cell) in done:
            continue
        fixed = {"nsamples": nsamples, "seqlen": seqlen, "sparsity_type": "experts"}
        pruned, kept = dense.pruned(recipe_for(method, str(ratio), "none", seed, **fixed), mixed(texts, mix))
        if json.dumps(kept) not in measured:
            measured[json.dumps(kept)] = perplexities(pruned)
        cell |= {"perplexity": measured[json.dumps(kept)], "specialists": kept_specialists(shares, kept), "kept": kept}
        add_cell(out, setup=setup, **cell)
        click.echo(f"{seed} {mix} {ratio} {method}: {cell['perplexity']} {cell['specialists']}", err=True)
    click.echo(markdown(read_cells(out)))


def key_of(cell: dict[str, Any]) -> tuple[str, str, float, int]:
    """What tells a cell from the others of its setup."""
    return cell["method"], cell["mix"], cell["ratio"], cell["seed"]


if __name__ == "__main__":
    main()
