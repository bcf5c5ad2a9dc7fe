"""The frontier: perplexity, KL divergence and speed against size, beside published structured pruning.

    python benchmarks/frontier.py --calibrate valid.txt --evaluate test.txt --out out/frontier.jsonl

Ours is ``neuronrank prune --target-params``; ``NeuronRank, neurons`` is one of the mixes that it compares. The peers
are in ``structured/``, each with its paper; all get the same calibration sequences and windows, and the same scope: the
whole decoder. None is trained afterwards. Sizes count the parameters outside the input and output embeddings, with
whatever a method adds. Peers that remove whole layers are measured with the numbers of layers on both sides of a
target. Cells that are there are not run again.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from cells import add_cell, read_cells, setup_of
from structured.flap import flap
from structured.layers import layers_at, replaceme, shortgpt
from structured.llm_pruner import prune as llm_pruner
from structured.slicegpt import prune as slicegpt

from neuronrank_core import Recipe
from neuronrank_core.mixes import mixes, passes
from neuronrank_torch.evaluation.speed import Spread
from neuronrank_torch.model.open import load_model
from neuronrank_torch.pruning.passes import outside_embeddings, prune_in_passes, sizes_of
from neuronrank_torch.text.sequences import calibration_sequences, evaluation_windows
from neuronrank_torch.text.sources import load_text

OURS, NEURONS = "NeuronRank", "NeuronRank, neurons"
#: For the speed.
TURNS = 7
#: Remove any share of the parameters, and whole layers.
BY_SHARE: dict[str, Callable[..., None]] = {"FLAP": flap, "SliceGPT": slicegpt, "LLM-Pruner": llm_pruner}
BY_LAYER: dict[str, Callable[..., None]] = {"ShortGPT": shortgpt, "ReplaceMe": replaceme}
Way = Callable[[Any, torch.Tensor], Any]


@torch.inference_mode()
def measured(dense: Any, model: Any, windows: torch.Tensor) -> dict[str, float]:
    """Perplexity of both models, mean KL divergence from the dense model, and speed as a multiple of its."""
    nll, divergence = [0.0, 0.0], 0.0
    for window in windows:
        ours, theirs = (torch.log_softmax(m(window[None]).logits[0, :-1].float(), -1) for m in (model, dense))
        for i, of in enumerate((ours, theirs)):
            nll[i] -= float(of.gather(1, window[1:, None]).sum())
        divergence += float((theirs.exp() * (theirs - ours)).sum())
    tokens = windows[:, 1:].numel()
    found = {"perplexity": math.exp(nll[0] / tokens), "dense": math.exp(nll[1] / tokens), "kl": divergence / tokens}
    return {**found, **{f"prefill {end}": value for end, value in vars(prefill(dense, model, windows[0])).items()}}


def prefill(dense: Any, model: Any, window: torch.Tensor) -> Spread:
    """How many times as fast as the dense model a model reads a window; median and quartiles."""
    ratios = []
    for _ in range(TURNS + 1):
        times = []
        for target in (dense, model):
            started = time.perf_counter()
            target(window[None], use_cache=False, logits_to_keep=1)
            times.append(time.perf_counter() - started)
        ratios.append(times[0] / times[1])
    return Spread.of(ratios[1:])


def ours(name: str, keep: float, options: list[str], _: Any, __: torch.Tensor) -> Any:
    """The model that the command saves."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["prune", "--model", name, "--target-params", str(keep), *options, "--save", f"{folder}/out"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        subprocess.run([sys.executable, "-m", "neuronrank_cli", *command], check=True, env=environment)
        return load_model(f"{folder}/out")[0]


def neurons(keep: float, recipe: Recipe, tokenizer: Any, text: str, model: Any, _: torch.Tensor) -> Any:
    """The model without neurons, as many as ``--target-params`` removes if it removes nothing else."""
    mix = mixes(sizes_of(model, recipe)[0], keep, recipe)["neurons"]
    prune_in_passes(model, tokenizer, passes(mix, recipe), text)
    return model


def ways(dense: Any, methods: tuple[str, ...], keep: float) -> Iterator[tuple[str, str, Way]]:
    """Each peer at a target: its name, how far it goes, and the function that prunes."""
    for name in filter(BY_SHARE.get, methods):
        yield name, f"{keep:g}", partial(_in_place, BY_SHARE[name], keep)
    for name, count in itertools.product(filter(BY_LAYER.get, methods), dict.fromkeys(layers_at(dense, keep))):
        yield name, f"{count} layers", partial(_in_place, BY_LAYER[name], count)


def _in_place(prune: Callable[..., None], how_far: float, model: Any, sequences: torch.Tensor) -> Any:
    prune(model, sequences, how_far)
    return model


@click.command(context_settings={"show_default": True})
@click.option("--model", default="builtin:smollm2-135m")
@click.option("--calibrate", required=True, help="Calibration text.")
@click.option("--evaluate", "evaluate_on", required=True, help="Evaluation text; never the calibration text.")
@click.option("--method", "methods", multiple=True, default=(OURS, NEURONS, *BY_SHARE, *BY_LAYER))
@click.option("--keep", "keeps", multiple=True, type=float, default=(0.9, 0.8, 0.7, 0.5))
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,))
@click.option("--nsamples", default=32)
@click.option("--seqlen", default=512)
@click.option("--windows", default=24)
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/frontier.jsonl"))
def main(
    model: str,
    calibrate: str,
    evaluate_on: str,
    methods: tuple[str, ...],
    keeps: tuple[float, ...],
    seeds: tuple[int, ...],
    nsamples: int,
    seqlen: int,
    windows: int,
    out: Path,
) -> None:
    """Measure every cell that is not there yet, then print the table."""
    dense, tokenizer, _ = load_model(model)
    texts = load_text(calibrate, "calibration"), load_text(evaluate_on, "evaluation")
    held_out = evaluation_windows(tokenizer, texts[1], seqlen=seqlen, windows=windows, bos_mode="window")
    setup = setup_of(model, calibrate, evaluate_on, texts, nsamples, seqlen, windows)
    done = {(c["method"], c["how far"], c["seed"]) for c in read_cells(out) if c["setup"] == setup}
    whole = outside_embeddings(dense)
    for seed, keep in itertools.product(seeds, keeps):
        recipe = Recipe(update="least-squares", nsamples=nsamples, seqlen=seqlen, seed=seed)
        sequences = calibration_sequences(tokenizer, recipe, texts[0])
        options = ["--dataset", calibrate, *f"--nsamples {nsamples} --seqlen {seqlen} --seed {seed}".split()]
        own = [(OURS, f"{keep:g}", partial(ours, model, keep, options))] if OURS in methods else []
        if NEURONS in methods:
            own.append((NEURONS, f"{keep:g}", partial(neurons, keep, recipe, tokenizer, texts[0])))
        for name, how_far, prune in [*own, *ways(dense, methods, keep)]:
            if (name, how_far, seed) in done:
                continue
            cell: dict[str, Any] = {"method": name, "how far": how_far, "keep": keep, "seed": seed, "setup": setup}
            started = time.perf_counter()
            try:
                pruned = prune(copy.deepcopy(dense), sequences)
            except NotImplementedError as error:
                add_cell(out, **cell, cannot=str(error))
                continue
            cell["seconds"] = time.perf_counter() - started
            cell |= {"share": outside_embeddings(pruned) / whole, **measured(dense, pruned, torch.from_numpy(held_out))}
            add_cell(out, **cell)
            click.echo(f"{name} {how_far} seed {seed}: {cell['share']:.4f} {cell['perplexity']:.2f}", err=True)
    click.echo(markdown(read_cells(out)))


def markdown(cells: list[dict[str, Any]]) -> str:
    """A table for each model: one row per cell, in the order of size."""
    lines: list[str] = []
    for name in dict.fromkeys(cell["setup"]["model"] for cell in cells):
        lines += ["", f"{name}", "", "| keep | method | seed | kept | perplexity | KL | speed | seconds |"]
        lines += ["| --- " * 8 + "|"]
        of = [cell for cell in cells if cell["setup"]["model"] == name]
        for cell in sorted(of, key=lambda c: (-c["keep"], c.get("perplexity", math.inf))):
            if "cannot" in cell:
                lines.append(f"| {cell['keep']} | {cell['method']} | {cell['seed']} | {cell['cannot']} | | | | |")
                continue
            shown = f"{cell['share']:.3f} | {cell['perplexity']:.2f} | {cell['kl']:.3f} | {cell['prefill median']:.2f}"
            lines.append(f"| {cell['keep']} | {cell['method']} | {cell['seed']} | {shown} | {cell['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
