"""GGUF files: recognised, and read one tensor at a time.

:mod:`neuronrank_torch.model.gguf_internals` is imported only when a GGUF file is read.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuronrank_torch.model.weights import WeightSource


def is_gguf(file: Path) -> bool:
    """Whether a file starts with the GGUF signature."""
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def gguf_shapes(file: Path) -> list[tuple[int, ...]]:
    """Shapes of the tensors in a GGUF file, in its order of axes (the reverse of torch's)."""
    from neuronrank_torch.model.gguf_internals import read_gguf

    return [tuple(map(int, tensor.shape)) for tensor in read_gguf(file).tensors]


def gguf_dtype(file: Path) -> str:
    """Name of the type of most of the bytes in a GGUF file, such as ``Q4_1``."""
    from neuronrank_torch.model.gguf_internals import read_gguf

    sizes: dict[str, int] = {}
    for tensor in read_gguf(file).tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return max(sizes, key=lambda name: sizes[name], default="")


def gguf_license(file: Path) -> str:
    """Licence that a GGUF file names; empty if it names none."""
    from neuronrank_torch.model.gguf_internals import read_gguf

    found = read_gguf(file).fields.get("general.license")
    return bytes(found.parts[found.data[0]]).decode("utf-8", errors="replace") if found else ""


class GgufWeights(WeightSource):
    """Tensors of a GGUF file, each dequantised when it is read, as transformers does for a whole file.

    The file stays memory-mapped: pages that were read may stay in memory until the system needs the space.

    Parameters
    ----------
    file : pathlib.Path
    model : transformers.PreTrainedModel
        Defines the names of the tensors. May be on the meta device.
    """

    def __init__(self, file: Path, model: Any) -> None:
        from neuronrank_torch.model.gguf_internals import named_tensors

        self._tensors, self._dequantise = named_tensors(file, model)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`WeightSource`."""
        return {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """See :class:`WeightSource`."""
        return torch.from_numpy(self._dequantise(self._tensors[name]))
