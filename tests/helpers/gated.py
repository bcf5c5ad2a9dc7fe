"""A gated MLP alone, and a witness that keeps everything the collector reduces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from neuronrank_core import LayerStatistics, Recipe, document_statistics
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.model.structure import resolve_layer

#: The layer's number, which errors must name.
INDEX = 7
#: Every kind of statistics.
EVERYTHING = {"method": "neuronrank_tfidf", "input_exp": 1.0, "spikiness_exp": 1.0}


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, random and small."""

    def __init__(self, features: int = 6, neurons: int = 10, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.gate_proj = nn.Linear(features, neurons, bias=False)
            self.up_proj = nn.Linear(features, neurons, bias=False)
            self.down_proj = nn.Linear(neurons, features, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def hooks(self) -> int:
        """Hooks on any of the modules."""
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.modules())


def documents(lengths: Sequence[int], features: int = 6, seed: int = 0) -> list[Tensor]:
    """Inputs of each document, on a level of its own so that documents differ."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, features, generator=generator) + torch.randn(features, generator=generator) for n in lengths]


def collector(mlp: GatedMLP, recipe: Recipe) -> LayerCollector:
    layer = resolve_layer(mlp, INDEX)
    return LayerCollector(layer, layer.blocks(), recipe)


@contextmanager
def record_activations(mlp: GatedMLP) -> Iterator[dict[str, list[Tensor]]]:
    """Keeps what gate, up and down see, micro-batch by micro-batch."""
    seen: dict[str, list[Tensor]] = {"x": [], "gate": [], "hidden": []}

    def gate(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        del module
        seen["x"].append(args[0])
        seen["gate"].append(output)

    hooks = [
        mlp.gate_proj.register_forward_hook(gate),
        mlp.down_proj.register_forward_pre_hook(lambda module, args: seen["hidden"].append(args[0])),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def collect(
    mlp: GatedMLP, texts: Sequence[Tensor], recipe: Recipe, batch_size: int = 1, *, reference: bool = False
) -> tuple[LayerStatistics, list[LayerStatistics]]:
    """The collector's table, and rows that the core makes of the very same activations."""
    rows: list[LayerStatistics] = []
    with collector(mlp, recipe) as c, record_activations(mlp) if reference else nullcontext({}) as seen:
        for first in range(0, len(texts), batch_size):
            batch = torch.stack(list(texts[first : first + batch_size]))
            mlp(batch)
            c.add_documents(first, batch.shape[1])
            for i in range(len(batch) if reference else 0):
                rows.append(core_row(mlp, first + i, *(seen[name][-1][i] for name in ("x", "gate", "hidden")), recipe))
    [table] = c.statistics()
    return table, rows


def core_row(mlp: GatedMLP, document: int, x: Tensor, gate: Tensor, hidden: Tensor, recipe: Recipe) -> LayerStatistics:
    signal = {"gate": gate, "activated": mlp.act_fn(gate), "product": hidden}[recipe.signal]
    return document_statistics(
        document,
        signal=signal.abs().double().numpy(),
        gate=gate.double().numpy(),
        inputs={"gate_proj": x.double().numpy(), "down_proj": hidden.double().numpy()},
        threshold=recipe.threshold,
        tokens_per_document=recipe.tokens_per_document,
    )


def assert_agrees(ours: LayerStatistics, reference: LayerStatistics) -> None:
    """The same columns: counts equal, real values to 1e-5."""
    a, b = ours.columns(), reference.columns()
    assert a.keys() == b.keys()
    for name, column in b.items():
        assert (a[name].dtype, a[name].shape) == (column.dtype, column.shape), name
        if column.dtype == np.int64:
            assert np.array_equal(a[name], column), name
        else:
            np.testing.assert_allclose(a[name], column, rtol=1e-5, err_msg=name)
