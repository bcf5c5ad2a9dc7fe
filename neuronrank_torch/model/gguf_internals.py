"""Everything that uses or replaces internals of gguf and transformers to read GGUF files.

``tests/torch/model/test_gguf_private_names.py`` lists the names and fails if an installed version lacks one. Without
them, :func:`cached_readers` makes loading slower, and :func:`named_tensors` fails, so that the model is loaded whole.
"""

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from transformers import modeling_gguf_pytorch_utils as reader


def read_gguf(file: Path) -> Any:
    """Parse a GGUF file. Called as transformers calls it, so that :func:`cached_readers` applies to both."""
    return gguf.GGUFReader(str(file))


def named_tensors(file: Path, model: Any) -> tuple[dict[str, Any], Callable[[Any], NDArray[Any]]]:
    """The tensors of a GGUF file by their names in a model, and the function that dequantises one of them.

    Parameters
    ----------
    file : pathlib.Path
    model : transformers.PreTrainedModel
        May be on the meta device.

    Raises
    ------
    AttributeError
        If this version of transformers or gguf lacks one of the internals.
    NotImplementedError
        If gguf does not know the model type.
    """
    content = read_gguf(file)
    architecture = reader.read_field(content, "general.architecture")[0]
    processor = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)(config=model.config.to_dict())
    names = reader.get_gguf_hf_weights_map(model, processor)

    def dequantise(tensor: Any) -> NDArray[Any]:
        dense = gguf.dequantize(tensor.data, tensor.tensor_type)
        return np.array(processor.process(weights=dense, name=tensor.name).weights)

    return {names[tensor.name]: tensor for tensor in content.tensors if tensor.name in names}, dequantise


@contextmanager
def cached_readers() -> Iterator[None]:
    """Context in which a GGUF file is parsed only once, whatever transformers loads from it.

    transformers parses the file for the configuration, for the tokenizer and for the weights, and rebuilds the table
    of tensor names for each of a model's hundreds of submodules. That takes two thirds of the loading time. All these
    results depend on the arguments alone.
    """

    def load_once(load: Any) -> Any:
        metadata = functools.cache(load)

        def loaded(path: Any, return_tensors: bool = False, **options: Any) -> dict[str, Any]:
            if return_tensors or options:
                return dict(load(path, return_tensors=return_tensors, **options))
            return {name: copy(part) for name, part in metadata(path).items()}  # Callers modify the result.

        return loaded

    with ExitStack() as stack:
        if gc.isenabled():  # Parsing creates hundreds of thousands of small objects, none of which is garbage.
            gc.disable()
            stack.callback(gc.enable)
        _replace(stack, gguf, "GGUFReader", lambda plain: functools.cache(_with_plain_array(plain)))
        _replace(stack, gguf, "get_tensor_name_map", functools.cache)
        _replace(stack, reader, "load_gguf_checkpoint", load_once)
        _replace(stack, reader, "tqdm", lambda _: lambda tensors, **_: tensors)  # No switch turns this bar off.
        yield


def _with_plain_array(base: Any) -> Any:
    class Reader(base):  # type: ignore[misc]
        """Slices a plain array. Slicing a memory map takes several times as long, and there are millions of slices."""

        @property
        def data(self) -> NDArray[np.uint8]:
            return self._mapped

        @data.setter
        def data(self, mapped: NDArray[np.uint8]) -> None:
            self._mapped = np.asarray(mapped)

    return Reader


def _replace(stack: ExitStack, module: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace a module's attribute, if it has it, until the stack is closed."""
    if hasattr(module, name):
        stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, wrap(getattr(module, name)))
