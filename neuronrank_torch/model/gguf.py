"""GGUF files: recognised, loaded as ordinary dense models, or read one tensor at a time.

:mod:`neuronrank_torch.model.gguf_internals` is imported only when a GGUF file is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from neuronrank_torch.model.weights import WeightSource


def is_gguf(file: Path) -> bool:
    """Whether a file starts with the GGUF signature."""
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Load a GGUF file as an ordinary, dense model that can be saved as a Hugging Face folder.

    Parameters
    ----------
    file : pathlib.Path
        The file.
    dtype : torch.dtype
        Precision of the weights in memory.

    Returns
    -------
    model : transformers.PreTrainedModel
    info : dict
        Loading info of transformers: ``missing_keys`` and so on.

    Raises
    ------
    Exception
        Whatever the readers raise on a bad file; they have no common base class.
    """
    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    if hasattr(transformers, "GgufConfig"):
        # Where a matmul kernel is installed, newer versions would otherwise keep the weights packed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=dtype, output_loading_info=True, **options
    )
    return model, info


def load_gguf_tokenizer(file: Path) -> Any:
    """Load the tokenizer of a GGUF file; raises as :func:`load_gguf`."""
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)


def gguf_shapes(file: Path) -> list[tuple[int, ...]]:
    """Shapes of the tensors in a GGUF file, in its order of axes (the reverse of torch's)."""
    from neuronrank_torch.model.gguf_internals import read_gguf

    return [tuple(map(int, tensor.shape)) for tensor in read_gguf(file).tensors]


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
