"""Runs the first layers of an unpruned model, and keeps two tables of each: the collector's and the core's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuronrank_core import LayerStatistics, Recipe, document_statistics, merge
from neuronrank_core.errors import UnsupportedModelError
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.layerwise import LayerRun, run_layers
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.blocks import Mlp
from neuronrank_torch.model.structure import find_decoder


@dataclass(frozen=True)
class Observed:
    """A layer after its run: its linear layers, the collector's table, and the core's of the same activations."""

    index: int
    mlp: Mlp
    table: LayerStatistics
    reference: LayerStatistics

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights in the precision that torch scores in."""
        return {role: weight.float() for role, weight in self.mlp.weights.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the model."""
        return self.mlp.projections["gate_proj"].weight.dtype

    @property
    def kernels(self) -> TorchKernels:
        """Torch's, on the device of the weights."""
        return TorchKernels(self.mlp.projections["gate_proj"].weight.device)


@contextmanager
def record_activations(mlp: Mlp) -> Iterator[dict[str, Tensor]]:
    """Record the last activations of a gated MLP: ``x``, ``gate`` and ``product``."""
    seen: dict[str, Tensor] = {}
    gate, down = mlp.projections["gate_proj"], mlp.projections["down_proj"]
    with (
        gate.on_input(lambda x: seen.update(x=x)),
        gate.on_output(lambda output: seen.update(gate=output)),
        down.on_input(lambda product: seen.update(product=product)),
    ):
        yield seen


def core_rows(seen: dict[str, Tensor], first: int, recipe: Recipe, layer: int) -> Iterator[LayerStatistics]:
    """The rows of the core for the documents of a micro-batch, the first of which is number ``first``."""
    arrays = {name: tensor.cpu().double().numpy() for name, tensor in seen.items()}
    for i, gate in enumerate(arrays["gate"]):
        yield document_statistics(
            first + i,
            signal=abs(gate),
            gate=gate,
            inputs={"gate_proj": arrays["x"][i], "down_proj": arrays["product"][i]},
            threshold=recipe.threshold,
            tokens_per_document=recipe.tokens_per_document,
            layer=layer,
        )


def observe(
    model: nn.Module,
    sequences: Tensor,
    recipe: Recipe,
    *,
    layers: int,
    batch_size: int,
    look: Callable[[Observed], None],
) -> None:
    """Run the first layers of a model, each dense and once.

    Parameters
    ----------
    model : transformers model
    sequences : int64 Tensor, shape (sequences, seqlen)
        On the model's device.
    recipe : Recipe
        Says which statistics to collect.
    layers : int
        Number of layers.
    batch_size : int
        Sequences per micro-batch.
    look : callable
        Called with each layer after it has run.

    Raises
    ------
    NeuronRankError
        If the model has MLPs without a gate, or an activation is NaN or Inf.
    """

    def visit(run: LayerRun) -> None:
        if run.index >= layers:
            return
        mlp = run.layer.mlp
        rows: list[LayerStatistics] = []

        def batch_done(first: int) -> None:
            collector.add_documents(first, run.hidden.shape[1])
            rows.extend(core_rows(seen, first, recipe, run.index))

        with LayerCollector(run.layer, [mlp], recipe) as collector, record_activations(mlp) as seen:
            run.feed(keep=True, after=batch_done)
        [table] = collector.statistics()
        assert table is not None
        look(Observed(run.index, mlp, table, merge(rows)))

    decoder = find_decoder(model)
    for layer in decoder.layers[:layers]:
        if not layer.mlp.gated:
            raise UnsupportedModelError(
                f"layer {layer.index} ({type(layer.module).__name__}) has a plain MLP, without a gate",
                hint="only models with gated MLPs can be verified yet",
            )
    with torch.no_grad():
        run_layers(decoder, sequences, visit, batch_size=batch_size)
