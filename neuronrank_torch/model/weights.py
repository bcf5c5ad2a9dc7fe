"""Where a model's weights are read from, one tensor at a time."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.model.tensor_files import read_header


class WeightSource(ABC):
    """Tensors by the names that the model gives them."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor there is, by name."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Read a tensor; it may share memory with the source, so copy it before writing to it."""

    def expect(self, names: Iterable[str]) -> None:
        """Say which tensors will be read next, so that a slow disk can get to work."""
        del names

    def as_stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model by the names, and in the parts, that a checkpoint like this one has them in."""
        return tensors

    def fit(self, model: Any) -> bool:
        """Whether the tensors are the model's own, so that they can be taken as they are.

        They are not where one is missing or has another shape, where a weight that the model ties to another is there
        besides it, or where transformers keeps some modules in another precision.
        """
        if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
            return False
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
        for file in files:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118 (not a dict)
                    self._file[name] = file
                    self._shapes[name] = tuple(content.get_slice(name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`WeightSource`."""
        return self._shapes

    def tensor(self, name: str) -> Tensor:
        """See :class:`WeightSource`."""
        # Opened for each tensor: what was read of a file counts as used memory for as long as the file is mapped.
        with safe_open(self._file[name], framework="pt") as content:
            tensor: Tensor = content.get_tensor(name)
        return tensor

    def expect(self, names: Iterable[str]) -> None:
        """Have the system read the tensors' files to its cache in the background; that is no memory of ours."""
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
        """Precision of the first tensor, which stands for all where a configuration does not say."""
        return next((self.tensor(name).dtype for name in self._file), None)


class LoadedWeights(WeightSource):
    """Tensors of a model that is in memory as a whole.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        May be changed or emptied afterwards; the tensors stay.
    """

    def __init__(self, model: Any) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in stored_tensors(model).items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`WeightSource`."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """See :class:`WeightSource`."""
        return self._tensors[name]


class FromFirst(WeightSource):
    """Tensors that the first rank reads for all; they have to ask for them together.

    Parameters
    ----------
    ranks : Ranks
    source : WeightSource, optional
        Where the first rank reads them; the others have none.
    """

    def __init__(self, ranks: Ranks, source: WeightSource | None = None) -> None:
        self.ranks, self.source = ranks, source

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`WeightSource`."""
        return self.ranks.from_first(lambda: self.source.shapes())  # type: ignore[union-attr]

    def tensor(self, name: str) -> Tensor:
        """See :class:`WeightSource`."""
        return self.ranks.from_first(lambda: self.source.tensor(name))  # type: ignore[union-attr]


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a weight that several modules share under the first name alone."""
    state = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    return {name: t for name, t in state.items() if id(t) not in seen and not seen.add(id(t))}  # type: ignore[func-returns-value]
