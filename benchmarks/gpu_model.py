"""Which GPU for which model: memory of each phase and time of a run, computed from bytes and operations.

    python benchmarks/gpu_model.py

Nothing is measured here. The formulas are explained in docs/measured/gpu.md, which holds the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from neuronrank_core import Recipe
from neuronrank_core.effort import passes_by_effort
from neuronrank_core.recipe import UPDATE_ITERATIONS
from neuronrank_core.update.least_squares import gradual_shares
from neuronrank_torch.runs.dry_run import GRAM_BYTES, SCORING_BYTES

#: Calibration text, as published Wanda and SparseGPT figures have it, and tokens of a micro-batch.
SEQUENCES, SEQLEN, BATCH = 128, 2048, 2048
#: The CUDA context and the libraries of torch.
CONTEXT = 0.6e9
#: Share of a card's memory that can be used.
USABLE = 0.93
#: Bytes a second that a disk reads, and that are made durable.
DISK, DURABLE = 3e9, 1.5e9
#: Matrices in float32 of the size of a module that the update holds at the same time.
ADMM = 10
#: The same Gram matrices as in GRAM_BYTES, solved in float32.
GRAM_BYTES_FLOAT32 = 24
#: Times that selection reads or writes each score of a module.
TOUCHES = 20


@dataclass(frozen=True)
class Model:
    """A decoder in bfloat16; ``attention`` counts the weights of q, k, v and o of a layer."""

    name: str
    layers: int
    hidden: int
    neurons: int
    attention: int
    vocabulary: int
    experts: int = 1
    active: int = 1

    @property
    def block(self) -> int:
        """Weights of an MLP, or of one expert."""
        return 3 * self.hidden * self.neurons

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        return self.experts * self.block + self.attention

    def forward(self, tokens: float) -> float:
        """Operations of a pass of this many tokens through a layer."""
        return 2 * tokens * (self.active * self.block + self.attention + SEQLEN * self.hidden)


@dataclass(frozen=True)
class Card:
    """A GPU: memory, and the peaks of its data sheet a second."""

    name: str
    memory: float
    bfloat16: float
    float32: float
    #: None where float64 takes 32 or 64 times as long, so that float32 is used.
    float64: float | None
    bandwidth: float
    link: float

    def seconds(self, bfloat16: float = 0.0, float32: float = 0.0, solve: float = 0.0) -> float:
        """Time of operations, at 40 % of the peak in bfloat16 and 60 % in the others."""
        solving = 0.6 * (self.float64 or self.float32)
        return bfloat16 / (0.4 * self.bfloat16) + float32 / (0.6 * self.float32) + solve / solving


MODELS = (
    Model("1B", 16, 2048, 8192, 2 * 2048 * (2048 + 512), 128256),
    Model("8B", 32, 4096, 14336, 2 * 4096 * (4096 + 1024), 128256),
    Model("30B-A3B", 48, 2048, 768, 2 * 2048 * (4096 + 512), 151936, experts=128, active=8),
    Model("70B", 80, 8192, 28672, 2 * 8192 * (8192 + 1024), 128256),
)
CARDS = (
    Card("8 GB (RTX 4060)", 8e9, 60e12, 15e12, None, 0.27e12, 16e9),
    Card("24 GB (RTX 4090)", 24e9, 165e12, 83e12, None, 1.0e12, 32e9),
    Card("80 GB (H100)", 80e9, 989e12, 67e12, 34e12, 3.35e12, 64e9),
)


def memory(model: Model, gram_bytes: int = GRAM_BYTES) -> dict[str, float]:
    """Bytes on the GPU: what stays there, and what each phase adds to it."""
    module = model.hidden * model.neurons
    return {
        "embeddings": 2 * model.vocabulary * model.hidden,
        "hidden states": 2 * SEQUENCES * SEQLEN * model.hidden,
        "two layers": 2 * 2 * model.layer,
        "pass": BATCH * (2 * (6 * model.hidden + 4 * model.active * model.neurons) + 3 * 4 * model.neurons),
        "score": 4 * model.block + SCORING_BYTES * module,
        "update": 6 * model.block + gram_bytes * model.neurons**2 + 4 * ADMM * module,
    }


def peak(model: Model, card: Card, *, update: bool, on_disk: bool) -> float:
    """Largest number of bytes at the same time."""
    found = memory(model, GRAM_BYTES_FLOAT32 if card.float64 is None else GRAM_BYTES)
    kept = 2 if update else 1  # An update keeps the outputs of the dense MLP too.
    stays = found["embeddings"] + found["two layers"] + CONTEXT + (0.0 if on_disk else kept * found["hidden states"])
    return stays + max(found["pass"], found["score"], found["update"] if update else 0.0)


def one_pass(model: Model, card: Card, share: float = 1.0) -> float:
    """Seconds of a pass of the text, or a share of it, through all layers, which are read on the way."""
    return model.layers * max(card.seconds(model.forward(share * SEQUENCES * SEQLEN)), read(model, card))


def read(model: Model, card: Card) -> float:
    """Seconds to bring a layer from the disk to the GPU."""
    return 2 * model.layer / min(DISK, 0.75 * card.link)


def run(
    model: Model,
    card: Card,
    *,
    gradual: bool = False,
    allocate: bool = False,
    share: float = 1.0,
    iterations: int = UPDATE_ITERATIONS,
    saved: bool = True,
) -> float:
    """Seconds of a prune, on a share of the text."""
    tokens, h, n = share * SEQUENCES * SEQLEN, model.hidden, model.neurons
    passes = 3 if gradual else 2
    shares = gradual_shares(iterations)
    selections = 1 + sum(a > b for a, b in zip(shares, (0.0, *shares), strict=False)) if gradual else 1
    work = card.seconds(passes * model.forward(tokens))
    work += selections * TOUCHES * 4 * model.experts * model.block / card.bandwidth
    if gradual:
        gram = 2 * tokens * (h**2 + n**2 + h * n)
        steps = 2 * (iterations + 3) * (2 * n * h**2 + h * n**2)
        # Two inverses for each of gate, up and down: of the residual norms, and of the iterations.
        work += card.seconds(float32=gram + steps, solve=2 * (2 * h**3 + n**3))
    layer = max(work, read(model, card)) + (2 * model.layer / DURABLE if saved else 0.0)
    return model.layers * layer + (one_pass(model, card, share) if allocate else 0.0)


def best(model: Model, card: Card) -> float:
    """Seconds of ``--effort best``: every candidate on a part of the text, then the dearest one on all of it."""
    *candidates, last = passes_by_effort(Recipe(nsamples=SEQUENCES))["best"]
    compared = (
        run(
            model,
            card,
            gradual=True,
            allocate=measures(one),
            share=one.nsamples / SEQUENCES,
            iterations=one.update_iterations,
            saved=False,
        )
        for one in candidates
    )
    return sum(compared) + run(model, card, gradual=True, allocate=measures(last))


def measures(recipe: Recipe) -> bool:
    """Whether the ratios of the layers take a pass of their own."""
    return recipe.differs_by_layer


def fits(model: Model, card: Card, *, update: bool) -> str:
    """Whether a run fits, and where its hidden states then are; empty if it does not."""
    room = USABLE * card.memory
    if peak(model, card, update=update, on_disk=False) <= room:
        return "yes"
    return "with `--hidden-states disk`" if peak(model, card, update=update, on_disk=True) <= room else ""


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, with two digits."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def lines() -> Iterator[str]:
    """The tables of the page."""
    names = list(memory(MODELS[0]))
    yield "| model | " + " | ".join(names) + " |"
    yield "| --- " * (len(names) + 1) + "|"
    for model in MODELS:
        found = memory(model)
        if model.experts > 1:
            found.pop("update")  # Not estimated.
        yield f"| {model.name} | " + " | ".join(f"{found[n] / 1e9:.1f}" if n in found else "-" for n in names) + " |"
    yield ""
    yield "| model, card | fits | with update | one pass | default run | `gradual` | `best` |"
    yield "| --- " * 7 + "|"
    for model in MODELS:
        for card in CARDS:
            plain, updated = fits(model, card, update=False), fits(model, card, update=True)
            times = [duration(one_pass(model, card)), duration(run(model, card))] if plain else ["-", "-"]
            possible = updated and model.experts == 1
            longer = [duration(run(model, card, gradual=True)), duration(best(model, card))] if possible else ["-", "-"]
            fitted = "not estimated" if model.experts > 1 else updated or "no"
            cells = (f"{model.name}, {card.name}", plain or "no", fitted, *times, *longer)
            yield "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print("\n".join(lines()))
