"""Reading a GGUF file through transformers: dequantised, and without reading the same file three times."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from neuronrank_torch.model.weights import WeightSource


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Any]]:
    """Load a GGUF file as an ordinary, dense model that can be saved as a Hugging Face folder.

    Inside :func:`readers_that_remember` it is parsed once.

    Parameters
    ----------
    file : pathlib.Path
        The file.
    dtype : torch.dtype
        Of the weights in memory.

    Returns
    -------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    info : dict
        Loading info of transformers: ``missing_keys`` and so on.

    Raises
    ------
    Exception
        Whatever the readers raise on a bad file; they have no common class.
    """
    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    tokenizer = load_gguf_tokenizer(file)
    if hasattr(transformers, "GgufConfig"):
        # Where a matmul kernel is installed, newer versions would otherwise keep the weights packed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=dtype, output_loading_info=True, **options
    )
    return model, tokenizer, info


def load_gguf_tokenizer(file: Path) -> Any:
    """Load the tokenizer that a GGUF file holds; raises as :func:`load_gguf`."""
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)


def gguf_shapes(file: Path) -> list[tuple[int, ...]]:
    """Shapes of the tensors that a GGUF file holds, with the axes in its own order."""
    import gguf

    content = gguf.GGUFReader(str(file))  # As transformers calls it: the file is parsed once for all.
    return [tuple(map(int, tensor.shape)) for tensor in content.tensors]


class GgufWeights(WeightSource):
    """Tensors of a GGUF file, each dequantised when it is asked for, as transformers does it for a whole file.

    What was read of the file stays mapped: pages of it may stay in memory for as long as the system has no other use
    for them.

    Parameters
    ----------
    file : pathlib.Path
    model : transformers.PreTrainedModel
        Its names are those that tensors are asked for by; may be on the meta device.
    """

    def __init__(self, file: Path, model: Any) -> None:
        import gguf
        from transformers import modeling_gguf_pytorch_utils as reader

        content = gguf.GGUFReader(str(file))  # As in gguf_shapes.
        architecture = reader.read_field(content, "general.architecture")[0]
        processor = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)
        self._processor = processor(config=model.config.to_dict())
        names = reader.get_gguf_hf_weights_map(model, self._processor)
        self._tensors = {names[tensor.name]: tensor for tensor in content.tensors if tensor.name in names}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`WeightSource`."""
        return {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """See :class:`WeightSource`."""
        import gguf

        found = self._tensors[name]
        dense = gguf.dequantize(found.data, found.tensor_type)
        return torch.from_numpy(np.array(self._processor.process(weights=dense, name=found.name).weights))


@contextmanager
def readers_that_remember() -> Iterator[None]:
    """Remember the parsed file, its metadata and the table of tensor names while transformers loads a GGUF file.

    It parses the file for the configuration, the tokenizer and the weights, and builds the table anew for each of a
    model's hundreds of submodules: two thirds of the time that loading takes. All depend on their arguments alone.
    Where a version of transformers no longer looks these names up, this changes nothing.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reader

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """Takes its slices of a plain array: of a memory map they cost several times as much, and it takes millions."""

        @property
        def data(self) -> NDArray[np.uint8]:
            return self._mapped

        @data.setter
        def data(self, mapped: NDArray[np.uint8]) -> None:
            self._mapped = np.asarray(mapped)

    load, metadata = reader.load_gguf_checkpoint, functools.cache(reader.load_gguf_checkpoint)

    def load_once(path: Any, return_tensors: bool = False, **options: Any) -> dict[str, Any]:
        if return_tensors or options:
            return dict(load(path, return_tensors=return_tensors, **options))
        return {name: copy(part) for name, part in metadata(path).items()}  # Callers change what they are given.

    with ExitStack() as stack:
        if gc.isenabled():  # Parsing makes hundreds of thousands of small objects, and none of them is garbage.
            gc.disable()
            stack.callback(gc.enable)
        _replace(stack, gguf, "GGUFReader", functools.cache(Reader))
        _replace(stack, gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        _replace(stack, reader, "load_gguf_checkpoint", load_once)
        if hasattr(reader, "tqdm"):  # This bar does not follow the switch of transformers.
            _replace(stack, reader, "tqdm", lambda tensors, **_: tensors)
        yield


def _replace(stack: ExitStack, module: Any, name: str, value: Any) -> None:
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)
