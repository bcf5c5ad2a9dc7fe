"""What several processes make of a prune: time of each phase, bytes that move, efficiency, and whether masks are equal.

    python benchmarks/distributed.py --calibrate valid.txt --out out/distributed.jsonl

Starts one process, then two by torchrun, and so on round after round, so that a busy machine slows all alike; a figure
is the median of the rounds. Every process has one thread. CPU seconds hold on a busy machine too; wall seconds do not.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from cells import add_cell
from torch import Tensor

from neuronrank_core import LayerStatistics, Recipe
from neuronrank_torch import prune
from neuronrank_torch.calibration.layerwise import LayerRun
from neuronrank_torch.distributed.process_group import launched
from neuronrank_torch.distributed.ranks import Ranks, T
from neuronrank_torch.model.open import load_model
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.text.sources import load_text, text_fingerprint

#: Settings of the recipe by what is timed.
RUNS: dict[str, dict[str, Any]] = {
    "neuronrank_wanda": {},
    "topic": {"method": "neuronrank_tfidf", "tfidf_mode": "topic"},
    "allocate": {"allocate": "neuronrank"},
    "update": {"update": "least-squares"},
}
MLP = ("gate_proj", "up_proj", "down_proj")


class Meter(Ranks):
    """Ranks that measure themselves: seconds, CPU seconds and bytes by phase."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.rank, self.size = ranks, ranks.rank, ranks.size
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)

    def timed(self, phase: str, work: Callable[[], T]) -> T:
        """Have something done, and note under a name what it took."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return work()
        finally:
            self.wall[phase] += time.perf_counter() - wall
            self.cpu[phase] += time.process_time() - cpu

    def _exchanged(self, phase: str, size: int, work: Callable[[], T]) -> T:
        if self.size > 1:
            self.timed("wait for others", dist.barrier)
        self.bytes[phase] += size
        return self.timed(phase, work)

    def union(self, items: list[T]) -> list[T]:
        """Rows of the table, or norms: what a rank sends to each other rank."""
        size = sum(map(_size, items)) * (self.size - 1)
        return self._exchanged("gather rows", size, lambda: self.ranks.union(items))

    def from_first(self, work: Callable[[], T]) -> T:
        """See :class:`Ranks`."""
        return self.ranks.from_first(work)

    def sum_in_order(self, matrix: Tensor) -> Tensor:
        """Gram matrices: a band to each other rank, and the sum of the own one to each."""
        size = 2 * matrix.nbytes * (self.size - 1) // self.size
        return self._exchanged("sum Gram matrices", size, lambda: self.ranks.sum_in_order(matrix))

    def agree(self, what: str, tensors: Iterable[Tensor]) -> None:
        """See :class:`Ranks`."""
        self._exchanged("compare weights", 0, lambda: self.ranks.agree(what, tensors))


def _size(item: Any) -> int:
    if isinstance(item, LayerStatistics):
        return sum(column.nbytes for column in item.columns().values())
    return item.nbytes if isinstance(item, Tensor) else 0


def member(model: str, text: Path, recipe: Recipe, masks: Path) -> dict[str, Any]:
    """One process of a run: what it measured, by phase; the first also saves the masks."""
    torch.set_num_threads(1)
    with launched() as ranks:
        meter = Meter(ranks)
        loaded, tokenizer, _ = meter.timed("load model", lambda: load_model(model))
        feed = LayerRun.feed

        def timed_feed(run: LayerRun, **options: Any) -> None:
            meter.timed("forward passes", lambda: feed(run, **options))

        LayerRun.feed = timed_feed  # type: ignore[method-assign]
        calibration = load_text(str(text), "calibration")
        ranks.union([None])  # All start together.
        meter.timed("prune", lambda: prune(loaded, tokenizer, recipe, calibration, ranks=meter))
        parts = set(meter.wall) - {"prune", "load model"}
        for clock in (meter.wall, meter.cpu):
            clock["score, mask, re-fit"] = clock["prune"] - sum(clock[phase] for phase in parts)
        if ranks.first:
            weights = [layer.mlp.weights[name] for layer in find_decoder(loaded).layers for name in MLP]
            np.save(masks, np.concatenate([np.packbits((weight == 0).numpy()) for weight in weights]))
        mine = {"wall": dict(meter.wall), "cpu": dict(meter.cpu), "bytes": dict(meter.bytes)}
        return {"ranks": ranks.union([mine]), "layers": len(find_decoder(loaded).layers), "first": ranks.first}


def started(processes: int, arguments: list[str]) -> dict[str, Any]:
    """Start this program as the members of a run, and return what they measured."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(["-m", *launcher] if processes > 1 else []), __file__, "--member", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, by phase: the slowest rank's seconds, all ranks' CPU seconds, and bytes a layer and rank."""
    first = rounds[0]["ranks"][0]

    def median(value: Callable[[list[dict[str, Any]]], float]) -> float:
        return statistics.median(value(measured["ranks"]) for measured in rounds)

    return {
        "wall": {p: median(lambda ranks, p=p: max(r["wall"].get(p, 0) for r in ranks)) for p in first["wall"]},
        "cpu": {p: median(lambda ranks, p=p: sum(r["cpu"].get(p, 0) for r in ranks)) for p in first["cpu"]},
        "cpu of the busiest": median(lambda ranks: max(r["cpu"]["prune"] for r in ranks)),
        "bytes": {phase: size / rounds[0]["layers"] for phase, size in first["bytes"].items()},
    }


def markdown(name: str, results: dict[int, dict[str, Any]]) -> str:
    """A table of the phases of a run, and its efficiency."""
    lines = [f"\n{name}\n", "| phase | " + " | ".join(f"{n}: CPU s (all) / wall s (slowest)" for n in results) + " |"]
    lines += ["| --- " * (len(results) + 1) + "|"]
    for phase in dict.fromkeys(phase for result in results.values() for phase in result["wall"]):
        cells = [f"{r['cpu'].get(phase, 0):.2f} / {r['wall'].get(phase, 0):.2f}" for r in results.values()]
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    for processes, result in results.items():
        moved = ", ".join(f"{phase} {size / 1e6:.2f} MB" for phase, size in result["bytes"].items() if size)
        alone = results.get(1)
        if alone is not None and processes > 1:
            lines.append(f"\n{processes} processes: {moved} sent a layer and rank; ")
            by_wall = alone["wall"]["prune"] / processes / result["wall"]["prune"]
            by_cpu = alone["cpu"]["prune"] / processes / result["cpu of the busiest"]
            lines[-1] += f"efficiency {by_wall:.2f} by wall time, {by_cpu:.2f} by the CPU time of the busiest rank; "
            lines[-1] += f"{result['bits that differ']} mask bits differ from one process"
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("--model", default="builtin:smollm2-135m")
@click.option("--calibrate", required=True, type=click.Path(exists=True, path_type=Path), help="Calibration text.")
@click.option("--nsamples", default=32)
@click.option("--seqlen", default=512)
@click.option("--processes", multiple=True, type=int, default=(1, 2))
@click.option("--recipe", "runs", multiple=True, default=("neuronrank_wanda", "update"), type=click.Choice(list(RUNS)))
@click.option("--rounds", default=3)
@click.option("--out", type=click.Path(path_type=Path), help="Add the result to this file of JSON lines.")
@click.option("--member", "masks", type=click.Path(path_type=Path), hidden=True)
def main(
    model: str,
    calibrate: Path,
    nsamples: int,
    seqlen: int,
    processes: tuple[int, ...],
    runs: tuple[str, ...],
    rounds: int,
    out: Path | None,
    masks: Path | None,
) -> None:
    """Measure the recipes with each number of processes and print the tables."""
    if masks is not None:
        result = member(model, calibrate, Recipe(**RUNS[runs[0]], nsamples=nsamples, seqlen=seqlen), masks)
        if result.pop("first"):
            click.echo(json.dumps(result))
        return
    fixed = ["--model", model, "--calibrate", str(calibrate), "--nsamples", str(nsamples), "--seqlen", str(seqlen)]
    setup = {
        "model": model,
        "calibrated on": f"{calibrate.name} {text_fingerprint(load_text(str(calibrate), 'calibration'))[:8]}",
        "sequences": f"{nsamples} x {seqlen}",
        "rounds": rounds,
        **versions(),
    }
    click.echo(", ".join(f"{key} {value}" for key, value in setup.items()))
    for name in runs:
        with tempfile.TemporaryDirectory() as folder:
            files = {n: Path(folder, f"{n}.npy") for n in processes}
            measured: dict[int, list[dict[str, Any]]] = {n: [] for n in processes}
            for _ in range(rounds):
                for n in processes:
                    measured[n].append(started(n, [str(files[n]), *fixed, "--recipe", name]))
            results = {n: summary(measured[n]) for n in processes}
            reference = np.load(files[min(processes)])
            for n in processes:
                results[n]["bits that differ"] = int(np.unpackbits(np.load(files[n]) ^ reference).sum())
        click.echo(markdown(name, results))
        if out is not None:
            add_cell(out, setup=setup, run=name, results=results)


if __name__ == "__main__":
    main()
