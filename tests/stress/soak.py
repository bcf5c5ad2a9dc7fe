"""Prunes again and again in one process, saved and in memory by turns; memory and files in use must stay flat.

    python tests/stress/soak.py --prunes 50

One line of JSON a prune on stdout, and a verdict. Tensors and modules that live, open and mapped files and threads have
to be as many at the end as after the warm-up. Resident memory, which allocators round up, may grow by a twentieth of
what it would grow by if each prune left a copy of the model behind. Exit code 1 if that does not hold. Linux only.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import psutil
import torch

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from tiny import tiny_model, tiny_tokenizer

from neuronrank_core import Recipe
from neuronrank_torch.model.quiet import quiet_transformers
from neuronrank_torch.runs.job import Evaluation, Job
from neuronrank_torch.runs.prune import run_prune

#: Share of what a leak of one model a prune would come to.
TOLERANCE = 0.05
#: Every way through the program that holds on to memory of its own; saved ones first, then in memory.
RECIPES = (
    {"method": "neuronrank_wanda", "update": "least-squares"},
    {"method": "neuronrank_tfidf", "tfidf_mode": "topic", "tfidf_k": 8},
    {"method": "wanda", "allocate": "neuronrank", "propagate": "dense"},
    {"method": "neuronrank_wanda", "sparsity_type": "neurons", "sparsity_ratio": 0.25},
    {"method": "magnitude", "sparsity_type": "2:4"},
)


def prunes(place: Path, model: Path, count: int) -> Iterator[int]:
    """Prune so many times; the number of each when it is done."""
    text = place / "text.txt"
    text.write_text(" ".join(f"Sentence {i} has {i * i} as its square." for i in range(400)))
    for number in range(count):
        saved = number % 2 == 0
        recipe = Recipe(nsamples=8, seqlen=64, **RECIPES[number // 2 % len(RECIPES)])
        job = Job(
            str(model),
            str(text),
            save=str(place / "out") if saved else None,
            force=True,
            device="cpu",
            evaluation=Evaluation(str(text), 64, 4),
            hidden_states="disk" if number % 4 == 0 else "memory",
        )
        run_prune(job, recipe)
        yield number + 1


def in_use() -> dict[str, int]:
    """What the process holds on to: tensors, modules (with their hooks), files, threads, and bytes of memory."""
    gc.collect()
    process = psutil.Process()
    kinds = list(map(type, gc.get_objects()))
    maps = Path("/proc/self/maps")
    mapped = {line for line in maps.read_text().splitlines() if ".safetensors" in line or "hidden" in line}
    return {
        "tensors": sum(issubclass(kind, torch.Tensor) for kind in kinds),
        "modules": sum(issubclass(kind, torch.nn.Module) for kind in kinds),
        "open files": process.num_fds(),
        "mapped files": len(mapped),
        "threads": process.num_threads(),
        "resident": process.memory_info().rss,
    }


def flat(before: dict[str, int], after: dict[str, int], leak: int) -> bool:
    """Whether nothing has grown; ``leak`` is what memory would have grown by if every prune left a model behind."""
    counts = before.keys() - {"resident"}
    same = all(after[name] <= before[name] for name in counts)
    return same and after["resident"] - before["resident"] <= TOLERANCE * leak


@contextlib.contextmanager
def small_model(hidden: int) -> Iterator[tuple[Path, Path, int]]:
    """A folder to work in, a model there, and the model's size in bytes."""
    with tempfile.TemporaryDirectory() as temporary:
        model = tiny_model(layers=4, hidden=hidden, intermediate=2 * hidden)
        size = sum(parameter.nbytes for parameter in model.parameters())
        with quiet_transformers():
            model.save_pretrained(Path(temporary, "model"))
        tiny_tokenizer(True).save_pretrained(Path(temporary, "model"))
        del model
        yield Path(temporary), Path(temporary, "model"), size


@click.command(context_settings={"show_default": True})
@click.option("--prunes", "count", default=50)
@click.option("--warm-up", default=10, help="Prunes after which nothing may grow any more.")
@click.option("--hidden", default=256, help="Width of the model, of four layers.")
def main(count: int, warm_up: int, hidden: int) -> None:
    """Prune COUNT times."""
    with small_model(hidden) as (place, model, size):
        states = []
        for number in prunes(place, model, count):
            states.append(in_use())
            click.echo(json.dumps({"prune": number, **states[-1]}))
    before, after = states[warm_up - 1], states[-1]
    leak = size * (count - warm_up)
    holds = flat(before, after, leak)
    grown = after["resident"] - before["resident"]
    click.echo(json.dumps({"model bytes": size, "grown by": grown, "allowed": int(TOLERANCE * leak), "flat": holds}))
    sys.exit(not holds)


if __name__ == "__main__":
    main()
