"""Perplexity per kind of text after removing experts, by method and by the kinds of text in the calibration.

    python benchmarks/expert_removal.py --model out/grown --texts out/grown/texts --out out/experts.jsonl

``--texts`` is a folder with ``KIND-train.txt`` to calibrate on and ``KIND-held.txt`` to measure on, as
``grow_mixture.py`` writes it. ``--mix`` gives the kinds and their shares of the calibration text. One line of JSON a
cell; cells that are there are not measured again. Besides perplexity a cell has, for every kind, how many of its
specialists were kept: experts with at least half of their tokens from this kind, where each kind has as many tokens.
"""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import click
import torch
from cells import add_cell, read_cells
from quality import recipe_for

from neuronrank_torch import prune
from neuronrank_torch.evaluation.perplexity import evaluate
from neuronrank_torch.model.open import load_model
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.text.sequences import evaluation_windows

METHODS = (
    "random",
    "expert_frequency",
    "reap",
    "neuronrank_tfidf,tfidf_mode=doc,idf_exp=0",
    "neuronrank_tfidf,tfidf_mode=doc",
    "neuronrank_tfidf,tfidf_mode=topic",
)
MIXES = ("prose=1", "prose=1,code=1,docs=1", "prose=18,code=1,docs=1")
#: Share of an expert's tokens from which on it is a specialist.
SPECIALIST = 0.5


def mixed(texts: dict[str, str], mix: str) -> str:
    """Text with the given shares of the kinds, as long as the shortest kind allows."""
    shares = {kind: float(share) for kind, share in (part.split("=") for part in mix.split(","))}
    unit = min(len(texts[kind]) / share for kind, share in shares.items())
    return "\n\n".join(texts[kind][: int(share * unit)] for kind, share in shares.items())


def router_rows(model: Any) -> list[torch.Tensor]:
    """The router's matrix of each layer."""
    return [layer.mlp.gate.weight.detach().clone() for layer in model.model.layers]


def count(chosen: torch.Tensor, into: torch.Tensor) -> None:
    """Add how many tokens go to each expert."""
    into += torch.bincount(chosen.flatten(), minlength=len(into))


@torch.no_grad()
def specialists(model: Any, windows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whether each expert is a specialist of each kind, (layers, experts); ``windows`` are equally many."""
    counts = []
    for ids in windows.values():
        routed = torch.zeros(len(model.model.layers), len(model.model.layers[0].mlp.gate.weight))

        hooks = [
            layer.mlp.gate.register_forward_hook(lambda *seen, row=row: count(seen[2][2], row))
            for layer, row in zip(model.model.layers, routed, strict=True)
        ]
        for batch in ids.split(4):
            model.model(batch)
        for hook in hooks:
            hook.remove()
        counts.append(routed)
    shares = torch.stack(counts) / torch.stack(counts).sum(0).clamp(min=1)
    return dict(zip(windows, shares >= SPECIALIST, strict=True))


def kept_specialists(
    of: dict[str, torch.Tensor], before: list[torch.Tensor], after: list[torch.Tensor]
) -> dict[str, list[int]]:
    """For every kind, how many of its specialists are there still, and how many there were."""
    kept = torch.stack([(b[:, None] == a).all(-1).any(1) for b, a in zip(before, after, strict=True)])
    return {kind: [int((special & kept).sum()), int(special.sum())] for kind, special in of.items()}


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
                    f"{sum(c['specialists'][k][0] for c in of) / len(of):.0f}/{of[0]['specialists'][k][1]}"
                    for k in kinds
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
@click.option("--windows", default=32)
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/experts.jsonl"))
@click.option("--table-only", is_flag=True)
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
    dense, tokenizer, _ = load_model(model)
    texts, held = (
        {path.name.removesuffix(f"-{part}.txt"): path.read_text() for path in sorted(folder.glob(f"*-{part}.txt"))}
        for part in ("train", "held")
    )
    setup = {"model": Path(model).name, "calibrated on": f"{nsamples} x {seqlen}"}
    setup |= {"measured on": f"{windows} x {seqlen}", **versions()}

    def perplexities(measured: Any) -> dict[str, float]:
        run = {"seqlen": seqlen, "windows": windows, "batch_size": 4}
        return {kind: evaluate(measured, tokenizer, text, **run).perplexity for kind, text in held.items()}

    cut = {"seqlen": seqlen, "windows": windows, "bos_mode": "window"}
    special = specialists(
        dense, {kind: torch.as_tensor(evaluation_windows(tokenizer, text, **cut)) for kind, text in held.items()}
    )
    done = {key_of(cell) for cell in read_cells(out) if cell["setup"] == setup}
    rows = router_rows(dense)
    for seed, mix, ratio, method in [(0, "none", 0.0, "dense"), *itertools.product(seeds, mixes, ratios, methods)]:
        if (seed, mix, ratio, method) in done:
            continue
        pruned = copy.deepcopy(dense)
        if ratio:
            fixed = {"nsamples": nsamples, "seqlen": seqlen, "sparsity_type": "experts"}
            recipe = recipe_for(method, str(ratio), "none", seed, **fixed)
            prune(pruned, tokenizer, recipe, mixed(texts, mix))
        cell = {"seed": seed, "mix": mix, "ratio": ratio, "method": method, "perplexity": perplexities(pruned)}
        cell["specialists"] = kept_specialists(special, rows, router_rows(pruned))
        add_cell(out, setup=setup, **cell)
        click.echo(f"{seed} {mix} {ratio} {method}: {cell['perplexity']} {cell['specialists']}", err=True)
    click.echo(markdown(read_cells(out)))


def key_of(cell: dict[str, Any]) -> tuple[int, str, float, str]:
    """What tells a cell from the others of its setup."""
    return cell["seed"], cell["mix"], cell["ratio"], cell["method"]


if __name__ == "__main__":
    main()
