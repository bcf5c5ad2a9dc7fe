"""What pruning costs beyond its forward passes, as ratios to a bare forward pass of the same tokens.

    python benchmarks/cost.py --calibrate valid.txt --out out/cost.json

The bare forward pass is the decoder without its head, in the same micro-batches. Pruned propagation needs two of them.
Everything is measured in turn, round after round, so that a busy machine slows all alike; a figure is the median of
the rounds' ratios. The runs start from the model in memory and include everything from drawing the text to the masks.
``peers.py`` compares the time of other projects with ours.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from cells import add_cell

from neuronrank_core import Recipe
from neuronrank_torch import prune
from neuronrank_torch.model.open import load_model
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.text.sequences import calibration_sequences
from neuronrank_torch.text.sources import load_text, text_fingerprint

#: What is timed: settings of the recipe, and how many forward passes it cannot do without.
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "wanda": ({"method": "wanda"}, 2),
    "neuronrank_wanda": ({"method": "neuronrank_wanda"}, 2),
    "doc": ({"method": "neuronrank_tfidf", "tfidf_mode": "doc"}, 2),
    "topic": ({"method": "neuronrank_tfidf", "tfidf_mode": "topic"}, 2),
    "doc, dense propagation": ({"method": "neuronrank_tfidf", "tfidf_mode": "doc", "propagate": "dense"}, 1),
    "allocate": ({"method": "neuronrank_wanda", "allocate": "neuronrank"}, 3),
    "update": ({"method": "neuronrank_wanda", "update": "least-squares"}, 3),
    "gradual": ({"method": "neuronrank_wanda", "update": "gradual"}, 3),
}


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def summary(rounds: list[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Median over the rounds of each run's time, and of what it takes beyond its passes, in bare forward passes."""
    result = {}
    for name in rounds[0]:
        passes = RUNS[name][1] if name in RUNS else 1
        wall, cpu = ([measured[name][i] / measured["bare"][i] for measured in rounds] for i in (0, 1))
        result[name] = {
            "passes": passes,
            "wall": statistics.median(wall),
            "cpu": statistics.median(cpu),
            "beyond_wall": statistics.median(wall) - passes,
            "beyond_cpu": statistics.median(cpu) - passes,
        }
    return result


def markdown(costs: dict[str, dict[str, float]]) -> str:
    """A table with one row a run."""
    lines = ["| run | passes needed | wall | CPU | beyond, wall | beyond, CPU |", "| --- " * 6 + "|"]
    for name, cost in costs.items():
        columns = [f"{cost[key]:.2f}" for key in ("wall", "cpu", "beyond_wall", "beyond_cpu")]
        lines.append(f"| {name} | {cost['passes']:.0f} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("--model", default="builtin:smollm2-135m")
@click.option("--calibrate", required=True, help="Calibration text.")
@click.option("--nsamples", default=32)
@click.option("--seqlen", default=512)
@click.option("--rounds", default=5)
@click.option("--run", "runs", multiple=True, default=tuple(RUNS), type=click.Choice([*RUNS]))
@click.option("--out", type=click.Path(path_type=Path), help="Add the result to this file of JSON lines.")
def main(
    model: str, calibrate: str, nsamples: int, seqlen: int, rounds: int, runs: tuple[str, ...], out: Path | None
) -> None:
    """Time the runs in turn and print their costs as ratios."""
    dense, tokenizer, _ = load_model(model)
    text = load_text(calibrate, "calibration")
    budget = {"nsamples": nsamples, "seqlen": seqlen}
    sequences = calibration_sequences(tokenizer, Recipe(**budget), text)

    def bare() -> None:
        with torch.no_grad():
            for batch in sequences.split(max(1, 2048 // seqlen)):
                dense.get_decoder()(input_ids=batch, use_cache=False)

    measured = []
    for number in range(-1, rounds):
        times = {"bare": timed(bare)}
        for name in runs:
            target = copy.deepcopy(dense)
            recipe = Recipe(**RUNS[name][0], **budget)
            times[name] = timed(lambda: prune(target, tokenizer, recipe, text))  # noqa: B023 (called at once)
        walls = ", ".join(f"{name} {wall:.1f} s" for name, (wall, _) in times.items())
        click.echo(f"round {number}: {walls}", err=True)
        if number >= 0:  # The first warms up.
            measured.append(times)
    costs = summary(measured)
    setup = {
        "model": model,
        "calibrated on": f"{Path(calibrate).name} {text_fingerprint(text)[:8]}, {nsamples} x {seqlen}",
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        **versions(),
    }
    click.echo(", ".join(f"{key} {value}" for key, value in setup.items()) + "\n\n" + markdown(costs))
    if out is not None:
        add_cell(out, setup=setup, costs=costs)


if __name__ == "__main__":
    main()
