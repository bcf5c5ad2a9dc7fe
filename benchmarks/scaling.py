"""How the cost of a prune grows with tokens, width and depth: random-weight LLaMAs of growing shapes, pruned and saved.

    python benchmarks/scaling.py --out out/scaling.jsonl --plot docs/measured/scaling.svg

Each cell is one ``neuronrank prune`` in a process of its own: its CPU time and its peak resident memory. Models have
the width of LLaMAs of 0.1 to 7 billion weights and a few layers, since a layer costs what every other one costs; they
are written shard by shard and never in memory at once. The line that is fitted says what the whole models would cost.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from cells import add_cell, read_cells
from low_memory import llama_config, write_model

from neuronrank_torch.pruning.result import versions

#: Hidden size, intermediate size, heads, and the layers of the whole model.
SHAPES = {
    "0.1B": (768, 2048, 12, 12),
    "0.3B": (1024, 2816, 16, 24),
    "1.1B": (2048, 5632, 32, 22),
    "3B": (3200, 8640, 32, 26),
    "7B": (4096, 11008, 32, 32),
}
#: What the whole models are said to cost on: 128 sequences of 2048 tokens.
TOKENS = 128 * 2048


def layer_weights(shape: str) -> int:
    """Weights of a layer's linear modules."""
    hidden, intermediate, _, _ = SHAPES[shape]
    return 4 * hidden**2 + 3 * hidden * intermediate


def measure(command: list[str]) -> dict[str, float]:
    """CPU seconds and peak resident bytes of a command."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}")
    # Kilobytes on Linux.
    return {"cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024.0}


def fit(cells: list[dict[str, Any]]) -> dict[str, float]:
    """``cpu = start + weights * (per_weight + tokens * per_weight_and_token)``, least squares of relative errors."""
    cpu = np.array([cell["cpu"] for cell in cells])
    weights = np.array([cell["layers"] * layer_weights(cell["shape"]) for cell in cells], dtype=float)
    tokens = np.array([cell["tokens"] for cell in cells])
    terms = np.stack([np.ones_like(cpu), weights, weights * tokens], axis=1)
    (start, per_weight, per_both), *_ = np.linalg.lstsq(terms / cpu[:, None], np.ones_like(cpu), rcond=None)
    error = np.abs(terms @ [start, per_weight, per_both] / cpu - 1)
    return {
        "start": start,
        "per_weight": per_weight,
        "per_weight_and_token": per_both,
        "largest_relative_error": float(error.max()),
    }


def markdown(cells: list[dict[str, Any]], line: dict[str, float]) -> str:
    """What was measured, the line, and what it says of the whole models."""
    lines = ["| shape | layers | tokens | CPU seconds | peak memory, GiB |", "| --- " * 5 + "|"]
    for c in cells:
        lines.append(f"| {c['shape']} | {c['layers']} | {c['tokens']} | {c['cpu']:.1f} | {c['peak'] / 2**30:.2f} |")
    lines += ["", ", ".join(f"{name} {value:.3g}" for name, value in line.items()), ""]
    lines += [f"| whole model, {TOKENS} tokens | CPU hours |", "| --- | --- |"]
    for shape, (*_, layers) in SHAPES.items():
        weights = layers * layer_weights(shape)
        cpu = line["start"] + weights * (line["per_weight"] + TOKENS * line["per_weight_and_token"])
        lines.append(f"| {shape} | {cpu / 3600:.1f} |")
    return "\n".join(lines)


def plot(cells: list[dict[str, Any]], line: dict[str, float], file: Path) -> None:
    """CPU time and memory against the weights of the layers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for layers, tokens in sorted({(c["layers"], c["tokens"]) for c in cells}):
        of = [c for c in cells if (c["layers"], c["tokens"]) == (layers, tokens)]
        weights = np.array([layers * layer_weights(c["shape"]) for c in of])
        (dots,) = time.loglog(weights, [c["cpu"] for c in of], "o", label=f"{layers} layers, {tokens} tokens")
        predicted = line["start"] + weights * (line["per_weight"] + tokens * line["per_weight_and_token"])
        time.loglog(weights, predicted, "-", color=dots.get_color())
        memory.semilogx([layer_weights(c["shape"]) for c in of], [c["peak"] / 2**30 for c in of], "o")
    time.set(xlabel="weights in all layers", ylabel="CPU seconds")
    time.legend(fontsize="small")
    memory.set(xlabel="weights in one layer", ylabel="peak resident memory, GiB", ylim=(0, None))
    figure.savefig(file)


@click.command(context_settings={"show_default": True, "ignore_unknown_options": True})
@click.option("--shape", "shapes", multiple=True, default=tuple(SHAPES), type=click.Choice(list(SHAPES)))
@click.option("--layers", "depths", multiple=True, default=(1, 3))
@click.option("--tokens", "budgets", multiple=True, default=(256, 1024))
@click.option("--seqlen", default=128)
@click.option("--vocab", default=1024)
@click.option("--work", type=click.Path(path_type=Path), help="Where to put the models; a temporary folder by default.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/scaling.jsonl"))
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Where to draw it; needs matplotlib.")
@click.argument("flags", nargs=-1)
def main(
    shapes: tuple[str, ...],
    depths: tuple[int, ...],
    budgets: tuple[int, ...],
    seqlen: int,
    vocab: int,
    work: Path | None,
    out: Path,
    picture: Path | None,
    flags: tuple[str, ...],
) -> None:
    """Measure every cell that is not there yet, with FLAGS added to the command, then print the line."""
    setup = {"flags": list(flags), "vocab": vocab, "seqlen": seqlen, "dtype": "bfloat16", **versions()}
    for shape, layers in itertools.product(shapes, depths):
        done = {(c["shape"], c["layers"], c["tokens"]) for c in read_cells(out) if c["setup"] == setup}
        left = [tokens for tokens in budgets if (shape, layers, tokens) not in done]
        if not left:
            continue
        hidden, intermediate, heads, _ = SHAPES[shape]
        config = llama_config(layers, hidden, intermediate, vocab, heads)
        with tempfile.TemporaryDirectory(dir=work) as place:
            write_model(Path(place, "model"), config)
            for tokens in left:
                command = [sys.executable, "-m", "neuronrank_cli", "prune", "--model", f"{place}/model", *flags]
                command += ["--nsamples", str(tokens // seqlen), "--seqlen", str(seqlen), "--save", f"{place}/{tokens}"]
                cell = {"shape": shape, "layers": layers, "tokens": tokens, **measure(command)}
                add_cell(out, setup=setup, **cell)
                click.echo(f"{shape}, {layers} layers, {tokens} tokens: {cell['cpu']:.1f} s", err=True)
    cells = [cell for cell in read_cells(out) if cell["setup"] == setup]
    line = fit(cells)
    click.echo(markdown(cells, line))
    if picture is not None:
        plot(cells, line, picture)


if __name__ == "__main__":
    main()
