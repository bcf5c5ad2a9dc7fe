"""Sources from which a model's weights are read, one tensor at a time."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.model.tensor_files import read_header


class WeightSource(ABC):
    """Tensors by their names in the model."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Read a tensor. It may share memory with the source: copy it before modifying it."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Announce the tensors that will be read next, so that the disk can start on them."""
        del names

    def as_stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert tensors of the model to the names and parts that this checkpoint stores them in.

        What cannot be converted keeps its name in the model.
        """
        return tensors

    def saved(self, file: Path) -> WeightSource:
        """Tensors by their names in the model, read from a file to which :meth:`as_stored` was written."""
        return SafetensorsWeights([file])

    def fit(self, model: Any) -> bool:
        """Whether the tensors match the model's in name and shape.

        They do not match if one is missing or has another shape, or if the source has a separate copy of a tied weight.
        """
        wanted, found = stored_tensors(model), self.shapes()
        tied = model.state_dict().keys() - wanted.keys()
        return not tied & found.keys() and all(found.get(name) == tuple(t.shape) for name, t in wanted.items())


class SafetensorsWeights(WeightSource):
    """Tensors of safetensors files.

    Parameters
    ----------
    files : iterable of pathlib.Path
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._file: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        #: Precision of every tensor by name, as safetensors calls it.
        self.dtypes: dict[str, str] = {}
        for file in files:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118 (not a dict)
                    tensor = content.get_slice(name)
                    self._file[name] = file
                    self._shapes[name] = tuple(tensor.get_shape())
                    self.dtypes[name] = tensor.get_dtype()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`WeightSource`."""
        return self._shapes

    def tensor(self, name: str) -> Tensor:
        """See :class:`WeightSource`."""
        # Opened for each tensor: pages that were read count as used memory for as long as the file is mapped.
        with safe_open(self._file[name], framework="pt") as content:
            tensor: Tensor = content.get_tensor(name)
        return tensor

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the system read the tensors into its file cache in the background."""
        if not hasattr(os, "posix_fadvise"):
            return
        wanted = set(names)
        for file in {self._file[name] for name in wanted}:
            tensors, data = read_header(file)
            with file.open("rb") as stream:
                for name in wanted & tensors.keys():
                    begin, end = tensors[name]["data_offsets"]
                    os.posix_fadvise(stream.fileno(), data + begin, end - begin, os.POSIX_FADV_WILLNEED)

    def first_dtype(self) -> torch.dtype | None:
        """Precision of the first tensor, used if the configuration does not state one; None without tensors."""
        return next((self.tensor(name).dtype for name in self._file), None)


class LoadedWeights(WeightSource):
    """Tensors of a model that is completely in memory.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        May be modified afterwards; this source keeps the tensors.
    layout : WeightSource, optional
        The checkpoint that the model was loaded from, whose names and parts a saved model gets.
    """

    def __init__(self, model: Any, layout: WeightSource | None = None) -> None:
        self._layout = layout or SafetensorsWeights([])
        self._tensors = {name: tensor.detach() for name, tensor in stored_tensors(model).items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`WeightSource`."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """See :class:`WeightSource`."""
        return self._tensors[name]

    def as_stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`WeightSource`."""
        return self._layout.as_stored(tensors)

    def saved(self, file: Path) -> WeightSource:
        """See :class:`WeightSource`."""
        return self._layout.saved(file)


def from_first(ranks: Ranks, source: WeightSource | None = None) -> Callable[[str], Tensor]:
    """How to read tensors that the first rank sends to all. All ranks must request them in the same order.

    Parameters
    ----------
    ranks : Ranks
    source : WeightSource, optional
        Source of the first rank; None on the others.
    """
    return lambda name: ranks.from_first(lambda: source.tensor(name))  # type: ignore[union-attr]


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name. A weight that modules share has the name that transformers saves."""
    state = model.state_dict(keep_vars=True)
    tied = getattr(model, "all_tied_weights_keys", {})  # By the names that are not saved.
    saved: dict[int, str] = {}
    for name in sorted(state, key=lambda name: name in tied):
        saved.setdefault(id(state[name]), name)
    return {name: tensor for name, tensor in state.items() if saved[id(tensor)] == name}
