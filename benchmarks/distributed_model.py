"""What a prune of a large model should take on many GPUs: the cost model of docs/understand/distributed.md, on paper.

    python benchmarks/distributed_model.py

Nothing is measured here. Work and bytes follow from the shapes and from what the program does; rates are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from neuronrank_core.recipe import UPDATE_ITERATIONS

#: Calibration text, as published Wanda and SparseGPT figures have it.
DOCUMENTS, SEQLEN, SAMPLED = 128, 2048, 64
PROCESSES = (1, 8, 64)


@dataclass(frozen=True)
class Shape:
    """A decoder of the LLaMA family in bfloat16."""

    name: str
    layers: int
    hidden: int
    neurons: int
    keys: int

    @property
    def mlp(self) -> int:
        """Weights of a layer's MLP."""
        return 3 * self.hidden * self.neurons

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        return self.mlp + 2 * self.hidden * (self.hidden + self.keys)


@dataclass(frozen=True)
class Rates:
    """What a machine with eight H100 is assumed to sustain, a second and GPU unless said otherwise."""

    forward: float = 400e12  # bfloat16; 40 % of the peak
    float32: float = 40e12  # without TF32; 60 % of the peak
    float64: float = 30e12
    select: float = 1e9  # weights scored and selected
    gather: float = 1e9  # bytes by gloo, pickled
    nvlink: float = 200e9  # bytes within a machine
    network: float = 30e9  # bytes between machines
    read: float = 5e9  # bytes from the machine's disk, while the layer before is at work
    write: float = 1.5e9  # bytes that the first rank makes durable


SHAPES = (Shape("7B", 32, 4096, 11008, 4096), Shape("70B", 80, 8192, 28672, 1024))
#: Passes over the text, whether the statistics hold samples, and whether weights are re-fitted.
RUNS = {"default": (2, False, False), "topic": (2, True, False), "update": (3, False, True)}


def row_bytes(shape: Shape, samples: bool) -> int:
    """A document's row of a layer's table: input mean squares, or moments, open gates and sampled signals."""
    if not samples:
        return 4 * (shape.hidden + shape.neurons)
    return (3 * 4 + 8 + 4 * SAMPLED) * shape.neurons


def gram_elements(shape: Shape) -> int:
    """Elements of a layer's Gram matrices: of the input, of the product, and of the dense with the pruned product."""
    return shape.hidden**2 + 2 * shape.neurons**2


def phases(shape: Shape, run: str, processes: int, rates: Rates) -> dict[str, float]:
    """Seconds of the phases of a whole run; reading counts where it takes longer than the work it is hidden behind."""
    passes, samples, update = RUNS[run]
    tokens, others = DOCUMENTS * SEQLEN / processes, (processes - 1) / processes
    link = rates.nvlink if processes <= 8 else rates.network
    solve32 = 2 * UPDATE_ITERATIONS * (2 * shape.neurons * shape.hidden**2 + shape.hidden * shape.neurons**2)
    solve64 = 2 * (2 * shape.hidden**3 + shape.neurons**3)
    layer = {
        "forward passes": passes * tokens * 2 * (shape.layer + SEQLEN * shape.hidden) / rates.forward,
        "Gram matrices": update * 2 * tokens * gram_elements(shape) / rates.float32,
        "score and select": shape.mlp / rates.select,
        "re-fit": update * (solve32 / rates.float32 + solve64 / rates.float64),
        "gather rows": others * DOCUMENTS * row_bytes(shape, samples) / rates.gather,
        "sum Gram matrices": update * 2 * others * 4 * gram_elements(shape) / link,
        "write": 2 * shape.layer / rates.write,
    }
    layer["read"] = max(0.0, 2 * shape.layer / rates.read - sum(layer.values()))
    return {name: shape.layers * seconds for name, seconds in layer.items()}


def main() -> None:
    """Print the predictions as Markdown."""
    names = list(phases(SHAPES[0], "default", 1, Rates()))
    print("| model, run | GPUs | " + " | ".join(names) + " | total | efficiency |")
    print("| --- " * (len(names) + 4) + "|")
    for shape in SHAPES:
        for run in RUNS:
            alone = sum(phases(shape, run, 1, Rates()).values())
            for processes in PROCESSES:
                parts = phases(shape, run, processes, Rates())
                total = sum(parts.values())
                cells = " | ".join(f"{seconds:.0f}" for seconds in parts.values())
                efficiency = f"{alone / processes / total:.2f}"
                print(f"| {shape.name}, {run} | {processes} | {cells} | {total:.0f} | {efficiency} |")


if __name__ == "__main__":
    main()
