"""What calibrating a layer of experts costs, as ratios to a forward pass of that layer, and its peak memory.

    python benchmarks/expert_cost.py --out out/expert-cost.jsonl

One decoder layer of Qwen3-MoE with random weights, by default in the shape of Qwen3-30B-A3B. Each pass runs the same
tokens, once as it is and once with what a method collects. Everything is measured in turn, round after round, so that
a busy machine slows all alike; a figure is the median of the rounds' ratios. Memory is the highest resident size of
the process during a pass, less that before it.
"""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click
import torch
from cells import add_cell
from cost import timed
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from neuronrank_core import Recipe
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.layerwise import LayerRun, run_layers
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.pruning.sparsity_types import sparsity_type_of

EXPERTS = {"sparsity_type": "experts", "sparsity_ratio": 0.25}
#: What is collected in a pass.
RUNS: dict[str, dict[str, Any]] = {
    "experts, reap": {"method": "reap", **EXPERTS},
    "experts, topics": {"method": "neuronrank_tfidf", "tfidf_mode": "topic", "signal": "product", **EXPERTS},
    "weights, wanda": {"method": "wanda"},
    "weights, neuronrank_wanda": {"method": "neuronrank_wanda"},
}


def peak() -> int:
    """The highest resident size since the last call of :func:`reset_peak`, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def reset_peak() -> int:
    """Forget the peak; returns the resident size now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def measured(run: LayerRun, rounds: int, runs: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Medians over the rounds: ratios of wall and CPU seconds to a bare pass, and memory in GiB."""
    kept: dict[str, list[tuple[float, float, float]]] = {"bare": [], **{name: [] for name in runs}}
    length = run.hidden.shape[1]

    def collecting(name: str) -> tuple[AbstractContextManager[Any], Any]:
        recipe = Recipe(**RUNS[name])
        blocks = sparsity_type_of(recipe).blocks(run.layer, recipe)
        collector = LayerCollector(run.layer, blocks, recipe, length, output_needed=False)
        return collector, lambda first: collector.add_documents(first, length)

    for number in range(-1, rounds):
        for name, of in kept.items():
            context, after = (nullcontext(), lambda first: None) if name == "bare" else collecting(name)
            before = reset_peak()
            with context:
                wall, cpu = timed(lambda: run.feed(keep=False, after=after))  # noqa: B023 (called at once)
            click.echo(f"round {number}: {name} {wall:.1f} s, CPU {cpu:.1f} s", err=True)
            if number >= 0:  # The first warms up.
                of.append((wall, cpu, (peak() - before) / 2**30))
    bare = kept["bare"]
    return {
        name: {
            "seconds": statistics.median(cpu for _, cpu, _ in of),
            "wall": statistics.median(one[0] / plain[0] for one, plain in zip(of, bare, strict=True)),
            "cpu": statistics.median(one[1] / plain[1] for one, plain in zip(of, bare, strict=True)),
            "memory": statistics.median(memory for _, _, memory in of),
        }
        for name, of in kept.items()
    }


@click.command(context_settings={"show_default": True})
@click.option("--hidden", default=2048)
@click.option("--experts", default=128)
@click.option("--width", default=768, help="Neurons of an expert.")
@click.option("--on", default=8, help="Experts of a token.")
@click.option("--dtype", default="float32")
@click.option("--documents", default=4)
@click.option("--seqlen", default=512)
@click.option("--batch-size", default=4)
@click.option("--rounds", default=3)
@click.option("--run", "runs", multiple=True, default=tuple(RUNS), type=click.Choice([*RUNS]))
@click.option("--out", type=click.Path(path_type=Path), help="Add the result to this file of JSON lines.")
@torch.no_grad()
def main(
    hidden: int,
    experts: int,
    width: int,
    on: int,
    dtype: str,
    documents: int,
    seqlen: int,
    batch_size: int,
    rounds: int,
    runs: tuple[str, ...],
    out: Path | None,
) -> None:
    """Time the passes in turn and print them as ratios."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 512),
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=on,
        moe_intermediate_size=width,
        norm_topk_prob=True,
        dtype=dtype,
    )
    torch.set_default_dtype(getattr(torch, dtype))
    model = Qwen3MoeForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    sequences = torch.randint(config.vocab_size, (documents, seqlen))
    found: dict[str, dict[str, float]] = {}
    run_layers(
        find_decoder(model), sequences, lambda run: found.update(measured(run, rounds, runs)), batch_size=batch_size
    )
    setup = {
        "shape": f"{experts} experts of {width}, {on} a token, hidden {hidden}",
        "dtype": dtype,
        "tokens": f"{documents} x {seqlen} in micro-batches of {batch_size}",
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        **versions(),
    }
    lines = ["| pass | CPU seconds | CPU | wall | memory, GiB |", "| --- " * 5 + "|"]
    for name, cost in found.items():
        row = (f"{cost['seconds']:.1f}", f"{cost['cpu']:.2f}", f"{cost['wall']:.2f}", f"{cost['memory']:.2f}")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    click.echo(", ".join(f"{key} {value}" for key, value in setup.items()) + "\n\n" + "\n".join(lines))
    if out is not None:
        add_cell(out, setup=setup, costs=found)


if __name__ == "__main__":
    main()
