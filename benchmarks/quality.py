"""Perplexity of every method at every sparsity, with and without weight update: the tables of the docs.

    python benchmarks/quality.py --calibrate valid.txt --evaluate test.txt --out quality.jsonl

One line of JSON a cell; cells that are there already are not run again, so an interrupted run goes on where it
stopped. The table is printed as Markdown at the end, and alone with --table-only. The processes of
``torchrun --nproc-per-node 2 benchmarks/quality.py ...`` share the text of every prune and evaluation.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from pathlib import Path
from typing import Any

import click
from cells import add_cell, read_cells, setup_of

from neuronrank_core import METHODS, InvalidValueError, Recipe
from neuronrank_core.recipe import UPDATES
from neuronrank_torch import prune
from neuronrank_torch.distributed.process_group import launched
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.evaluation.perplexity import evaluate
from neuronrank_torch.model.open import load_model
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.text.sources import load_text

SPARSITIES = ("0.5", "0.6", "0.7", "2:4", "4:8", "neurons:0.2")


def recipe_for(method: str, sparsity: str, update: str, seed: int, **fixed: Any) -> Recipe:
    """The recipe of a cell; ``method`` may carry settings, as in ``neuronrank_tfidf,tfidf_mode=topic``."""
    name, *settings = method.split(",")
    chosen = {
        key: json.loads(value) if value[0] in "-.0123456789" else value
        for key, value in (setting.split("=") for setting in settings)
    }
    kind, _, ratio = sparsity.partition(":") if sparsity.startswith("neurons") else ("", "", sparsity)
    if kind:
        chosen |= {"sparsity_type": "neurons", "sparsity_ratio": float(ratio)}
    elif ":" in sparsity:
        chosen |= {"sparsity_type": sparsity}
    else:
        chosen |= {"sparsity_ratio": float(sparsity)}
    return Recipe(method=name, update=update, seed=seed, **chosen, **fixed)


def markdown(cells: list[dict[str, Any]], measure: str = "perplexity") -> str:
    """One row per method and update, one column per sparsity, the mean over seeds, and what it was measured on."""
    lines = []
    for setup, group in itertools.groupby(cells, key=lambda cell: json.dumps(cell["setup"], sort_keys=True)):
        measured = list(group)
        columns = list(dict.fromkeys(cell["sparsity"] for cell in measured))
        rows = list(dict.fromkeys((cell["method"], cell["update"]) for cell in measured))
        about = json.loads(setup)
        lines += ["", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
        lines += ["| method | update | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
        for method, update in rows:
            values = []
            for column in columns:
                of = [
                    c[measure]
                    for c in measured
                    if (c["method"], c["update"], c["sparsity"]) == (method, update, column) and measure in c
                ]
                values.append(f"{sum(of) / len(of):.2f}" + (f" ({len(of)} seeds)" if len(of) > 1 else "") if of else "")
            lines.append(f"| {method} | {update} | " + " | ".join(values) + " |")
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("--model", default="builtin:smollm2-135m")
@click.option("--calibrate", required=True, help="Calibration text.")
@click.option("--evaluate", "evaluate_on", required=True, help="Evaluation text; never the calibration text.")
@click.option("--method", "methods", multiple=True, default=tuple(METHODS), help="May carry settings: name,key=value.")
@click.option("--sparsity", "sparsities", multiple=True, default=SPARSITIES)
@click.option("--update", "updates", multiple=True, default=UPDATES)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,))
@click.option("--nsamples", default=32)
@click.option("--seqlen", default=512)
@click.option("--windows", default=24)
@click.option("--propagate", default="pruned")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/quality.jsonl"))
@click.option("--table-only", is_flag=True)
@click.pass_obj
def main(
    ranks: Ranks,
    model: str,
    calibrate: str,
    evaluate_on: str,
    methods: tuple[str, ...],
    sparsities: tuple[str, ...],
    updates: tuple[str, ...],
    seeds: tuple[int, ...],
    nsamples: int,
    seqlen: int,
    windows: int,
    propagate: str,
    out: Path,
    table_only: bool,
) -> None:
    """Measure every cell that is not there yet, then print the table."""
    if table_only:
        click.echo(markdown(read_cells(out)))
        return
    dense, tokenizer, _ = load_model(model)
    texts = ranks.from_first(lambda: (load_text(calibrate, "calibration"), load_text(evaluate_on, "evaluation")))
    setup = setup_of(model, calibrate, evaluate_on, texts, nsamples, seqlen, windows)
    setup |= {"propagate": propagate, **versions()}

    def measure(target: Any) -> float:
        return evaluate(target, tokenizer, texts[1], seqlen=seqlen, windows=windows, ranks=ranks).perplexity

    def record(**cell: Any) -> None:
        if not ranks.first:
            return
        add_cell(out, setup=setup, **cell)
        click.echo(
            f"{cell['method']} {cell['sparsity']} {cell['update']} seed {cell['seed']}: {cell['perplexity']:.2f}",
            err=True,
        )

    done = ranks.from_first(lambda: {key_of(cell) for cell in read_cells(out) if cell["setup"] == setup})
    if ("dense", "0", "none", 0) not in done:
        record(method="dense", sparsity="0", update="none", seed=0, perplexity=measure(dense), seconds=0.0)
    for sparsity, method, update, seed in itertools.product(sparsities, methods, updates, seeds):
        if (method, sparsity, update, seed) in done:
            continue
        try:
            recipe = recipe_for(method, sparsity, update, seed, nsamples=nsamples, seqlen=seqlen, propagate=propagate)
        except InvalidValueError:
            continue  # there is no such combination
        pruned, started = copy.deepcopy(dense), time.perf_counter()
        prune(pruned, tokenizer, recipe, texts[0], ranks=ranks)
        seconds = time.perf_counter() - started
        record(method=method, sparsity=sparsity, update=update, seed=seed, perplexity=measure(pruned), seconds=seconds)
    if ranks.first:
        click.echo(markdown(read_cells(out)))


def key_of(cell: dict[str, Any]) -> tuple[str, str, str, int]:
    """What tells a cell from the others of its setup."""
    return cell["method"], cell["sparsity"], cell["update"], cell["seed"]


if __name__ == "__main__":
    with launched() as joined:
        main(obj=joined)
