"""A model whose weights are loaded one unit at a time: a decoder layer, the head, or the rest."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from neuronrank_torch.model.read_ahead import ReadAhead
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.model.weights import WeightSource, stored_tensors

#: Index of a decoder layer, ``lm_head`` if its weight is not tied, or ``embeddings`` for everything else.
Unit = int | str
HEAD, REST = "lm_head", "embeddings"
#: Types of devices to which the next layer is copied early; elsewhere it is only prefetched from the disk.
READS_AHEAD = ("cuda",)
#: Context in which a unit has its weights in memory.
Resident = Callable[[Unit], AbstractContextManager[None]]


class StreamedModel:
    """A transformers model that keeps embeddings and norms in memory, and layers and head only while they are used.

    On CUDA, the next layer is copied to the device while one is at work, so that two are there.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its weights are released; its buffers are kept.
    source : WeightSource
        Where its weights are read from.
    device : torch.device
        Where it runs.
    layout : WeightSource, optional
        The checkpoint whose names and parts a saved model gets, if that is not ``source``.
    """

    def __init__(
        self, model: Any, source: WeightSource, device: torch.device, layout: WeightSource | None = None
    ) -> None:
        self.model, self.source, self.device, self.layout = model, source, device, layout or source
        self.read_ahead = ReadAhead(device) if device.type in READS_AHEAD else None
        self.decoder = find_decoder(model)
        self.units = self._divide()
        self.release()
        for name, buffer in list(model.named_buffers()):
            if buffer.device.type != "meta":
                self._assign(name, buffer.to(device))
        self._bring(REST, source.tensor)
        model.tie_weights()

    def _divide(self) -> dict[Unit, list[str]]:
        """Names of the tensors of each unit. The units are in the order of the model, after the rest."""
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
    def resident(self, unit: Unit, read: Callable[[str], Tensor] | None = None) -> Iterator[None]:
        """Context in which the weights of a layer or the head are in memory.

        Parameters
        ----------
        unit : int or str
            Key of ``units``. Any other, such as a tied head, is ignored.
        read : callable, optional
            Reads a tensor by its name, instead of the model's own source.
        """
        if unit not in self.units:
            yield
            return
        try:
            self._bring(unit, read or self.source.tensor)
            yield
        finally:
            self._release(unit)

    @contextmanager
    def original(self, unit: Unit, read: Callable[[str], Tensor]) -> Iterator[None]:
        """Context in which a unit that is in memory has its original weights; ``read`` brings back its own."""
        with self.resident(unit):
            yield
        self._bring(unit, read)

    def tensors(self, unit: Unit) -> dict[str, Tensor]:
        """The current tensors of a unit by name."""
        return {name: self._get(name).detach() for name in self.units[unit]}

    def reshape(self, unit: Unit, shapes: dict[str, tuple[int, ...]]) -> None:
        """Change the shapes of the tensors of a unit that is not in memory."""
        for name in self.units[unit]:
            self._assign(name, self._get(name).new_empty(shapes[name]))

    def bytes(self, unit: Unit) -> int:
        """Size of a unit in bytes; 0 if the model does not have it."""
        return sum(self._get(name).nbytes for name in self.units.get(unit, ()))

    def _bring(self, unit: Unit, read: Callable[[str], Tensor]) -> None:
        """Load a unit, and begin to copy or prefetch the next one."""
        early = self.read_ahead.take(unit) if self.read_ahead is not None else {}
        own = read == self.source.tensor
        for name in self.units[unit]:
            # Always copied: the tensor may be part of a mapped file, which has another alignment and is read again.
            tensor = early[name] if own and early else read(name).to(self.device, self._get(name).dtype, copy=True)
            self._assign(name, tensor)
        order = list(self.units)
        for following in order[order.index(unit) + 1 :][:1]:
            if self.read_ahead is not None and own and following != HEAD:  # Not every run needs the head.
                dtypes = {name: self._get(name).dtype for name in self.units[following]}
                self.read_ahead.start(following, dtypes, self.source.tensor)
            else:
                self.source.prefetch(self.units[following])

    def release(self) -> None:
        """Drop all weights that are in memory; the model cannot run any more."""
        for unit in self.units:
            self._release(unit)
        self.model.tie_weights()  # A tied head would keep the embeddings.

    def reopener(self) -> Callable[[], "StreamedModel"]:
        """A function that opens the model once more, as it is now, from the same source.

        What is done to this model afterwards does not change the result, nor does what is done to an earlier result.
        """
        empty: dict[int, Any] = {}
        for tensor in map(self._get, chain(*self.units.values())):
            meta = torch.empty_like(tensor, device="meta")
            empty[id(tensor)] = nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
        blank, place = copy.deepcopy(self.model, empty), (self.source, self.device, self.layout)
        return lambda: StreamedModel(copy.deepcopy(blank), *place)

    def _release(self, unit: Unit) -> None:
        for name in self.units[unit]:
            self._assign(name, torch.empty_like(self._get(name), device="meta"))

    def _get(self, name: str) -> Tensor:
        tensor: Tensor = attrgetter(name)(self.model)
        return tensor

    def _assign(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        parameter = isinstance(getattr(owner, leaf), nn.Parameter)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)
