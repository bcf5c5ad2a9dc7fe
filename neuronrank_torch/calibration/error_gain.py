"""How much of an error of an MLP's output reaches the layer's output, measured on the layer's own forward."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neuronrank_core.errors import NonFiniteError
from neuronrank_core.selection.allocation import error_gain, random_error
from neuronrank_torch.calibration.layerwise import LayerRun, split_output
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.model.blocks import Mlp

#: One out of this many documents is measured: those whose identifier is a multiple.
EVERY = 32


def error_gains(run: LayerRun, mlps: Sequence[Mlp], ranks: Ranks, first: int = 0) -> NDArray[np.float32]:
    """Measure :func:`neuronrank_core.selection.allocation.error_gain` at the outputs of MLPs of a layer.

    Parameters
    ----------
    run : LayerRun
        At the input of the layer.
    mlps : sequence of Mlp
    ranks : Ranks
    first : int
        Identifier of the first document of all ranks.

    Returns
    -------
    float32 array, shape (documents, mlps)
        Routed experts share the gain of their sum. NaN for documents in which it is not measured.

    Raises
    ------
    NonFiniteError
        If the layer's output is NaN or Inf.
    """
    outputs = [run.layer.output_of(mlp) for mlp in mlps]
    rows: list[NDArray[np.float32]] = []
    for index, sequence in enumerate(run.hidden, start=first + run.first):
        row = np.full(len(outputs), np.nan, dtype=np.float32)
        if index % EVERY == 0:
            before = split_output(run.forward(sequence[None]))[0]
            gains = {m: error_gain(*disturbed(run, sequence, before, m, index)) for m in dict.fromkeys(outputs)}
            row[:] = [gains[module] for module in outputs]
        rows.append(row)
    every = ranks.union(rows)
    return np.stack(every)


def disturbed(
    run: LayerRun, sequence: Tensor, before: Tensor, module: nn.Module, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a random error of a module's output changes in the layer's output.

    Parameters
    ----------
    run : LayerRun
    sequence : Tensor, shape (seqlen, hidden_size)
        Hidden states before the layer.
    before : Tensor, shape (1, seqlen, hidden_size)
        The layer's output without the error.
    module : torch.nn.Module
        In the layer.
    seed : int
        See :func:`neuronrank_core.selection.allocation.random_error`.

    Returns
    -------
    change, error : float32 array, shape (seqlen, hidden_size)

    Raises
    ------
    NonFiniteError
        If the layer's output is NaN or Inf.
    """
    probe = _Probe(seed)
    with module.register_forward_hook(probe.disturb):
        change = _rows(split_output(run.forward(sequence[None]))[0]) - _rows(before)
    if not np.isfinite(change).all():
        raise NonFiniteError(f"NaN or Inf in the output of layer {run.index}", hint="try --dtype float32")
    return change, probe.error


def shifted(output: Callable[[], Tensor], module: nn.Module) -> tuple[Tensor, Tensor]:
    """What a shift of a module's output, as large as a layer's output, changes in the layer's output.

    Parameters
    ----------
    output : callable
        Runs the layer and returns its output, shape (sequences, seqlen, hidden_size).
    module : torch.nn.Module
        In the layer; its output has as many features.

    Returns
    -------
    change : float32 Tensor, shape (sequences, seqlen, hidden_size)
    shift : float32 Tensor, shape (hidden_size,)
    """
    before = output()
    scale, features = before.float().square().mean().sqrt(), before.shape[-1]
    shift = (scale * torch.linspace(-1, 1, features, device=before.device)).to(before.dtype)
    with module.register_forward_hook(lambda _, args, out: out + shift):
        return output().float() - before.float(), shift.float()


def _rows(states: Tensor) -> NDArray[Any]:
    return states.detach().float().flatten(0, -2).cpu().numpy()


class _Probe:
    """A hook that adds a random error to a module's output, and keeps the error as rounded by the addition."""

    def __init__(self, seed: int) -> None:
        self.seed, self.error = seed, np.zeros((0, 0), dtype=np.float32)

    def disturb(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        del module, args
        rows = _rows(output)
        disturbed = (output + output.new_tensor(random_error(rows, self.seed)).view_as(output)).detach()
        self.error = _rows(disturbed) - rows
        return disturbed
