"""A model whose weights come to memory unit by unit: a decoder layer, the head, or all the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.model.weights import WeightSource, stored_tensors

#: A decoder layer by number, ``lm_head`` where it has a weight of its own, and everything else.
Unit = int | str
HEAD, REST = "lm_head", "embeddings"
#: Context in which a unit has its weights in memory.
Resident = Callable[[Unit], AbstractContextManager[None]]


class StreamedModel:
    """A transformers model with the rest (embeddings, norms) in memory, and layers and head only while at work.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Weights that it holds are let go of; its buffers are kept.
    source : WeightSource
        Where its weights are.
    device : torch.device
        Where it works.
    """

    def __init__(self, model: Any, source: WeightSource, device: torch.device) -> None:
        self.model, self.source, self.device = model, source, device
        self.decoder = find_decoder(model)
        self.units = self._divide()
        for unit in self.units:
            self._release(unit)
        for name, buffer in list(model.named_buffers()):
            if buffer.device.type != "meta":
                self._assign(name, buffer.to(device))
        self._bring(REST, source)
        model.tie_weights()

    def _divide(self) -> dict[Unit, list[str]]:
        """Names of the tensors of each unit, in the order of the model."""
        modules = {id(module): name for name, module in self.model.named_modules()}
        prefixes: dict[Unit, str] = {i: modules[id(layer.module)] + "." for i, layer in enumerate(self.decoder.layers)}
        head = self.model.get_output_embeddings()
        if head is not None and head.weight is not self.model.get_input_embeddings().weight:
            prefixes[HEAD] = modules[id(head)] + "."
        units: dict[Unit, list[str]] = {REST: [], **{unit: [] for unit in prefixes}}
        for name in stored_tensors(self.model):
            units[next((unit for unit, prefix in prefixes.items() if name.startswith(prefix)), REST)].append(name)
        return units

    @contextmanager
    def resident(self, unit: Unit, source: WeightSource | None = None) -> Iterator[None]:
        """Have the weights of a layer or the head in memory inside.

        Parameters
        ----------
        unit : int or str
            Key of ``units``; one that is not there, as a tied head, needs nothing.
        source : WeightSource, optional
            Where to read them, instead of the model's own source.
        """
        if unit not in self.units:
            yield
            return
        try:
            self._bring(unit, source or self.source)
            yield
        finally:
            self._release(unit)

    def tensors(self, unit: Unit) -> dict[str, Tensor]:
        """The tensors of a unit by name, as they are now."""
        return {name: self._get(name).detach() for name in self.units[unit]}

    def reshape(self, unit: Unit, shapes: dict[str, tuple[int, ...]]) -> None:
        """Give the tensors of a unit that is not in memory the shapes that they have in another source."""
        for name in self.units[unit]:
            self._assign(name, self._get(name).new_empty(shapes[name]))

    def bytes(self, unit: Unit) -> int:
        """Size of a unit in memory; 0 for one that is not there."""
        return sum(self._get(name).nbytes for name in self.units.get(unit, ()))

    def _bring(self, unit: Unit, source: WeightSource) -> None:
        """Read a unit; while work on it goes on, the one after it is read from disk."""
        for name in self.units[unit]:
            # Always copied: a source may be a mapped file, whose tensors are aligned otherwise, and be read again.
            self._assign(name, source.tensor(name).to(self.device, self._get(name).dtype, copy=True))
        order = list(self.units)
        for following in order[order.index(unit) + 1 :][:1]:
            self.source.expect(self.units[following])

    def _release(self, unit: Unit) -> None:
        for name in self.units[unit]:
            self._assign(name, torch.empty_like(self._get(name), device="meta"))

    def _get(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(path), leaf)
        return tensor

    def _assign(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        parameter = isinstance(getattr(owner, leaf), nn.Parameter)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)
