"""Reading a GGUF file through transformers: dequantised, and without reading the same file three times."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Any]]:
    """Load a GGUF file as an ordinary, dense model that can be saved as a Hugging Face folder.

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
    with _each_read_once():
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
        if hasattr(transformers, "GgufConfig"):
            # Where a matmul kernel is installed, newer versions would otherwise keep the weights packed.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=dtype, output_loading_info=True, **options
        )
    return model, tokenizer, info


@contextmanager
def _each_read_once() -> Iterator[None]:
    """Remember the parsed file and the table of tensor names while transformers loads a GGUF file.

    It parses the file for the configuration, the tokenizer and the weights, and builds the table anew for each of a
    model's hundreds of submodules: two thirds of the time that loading takes. Both depend on their arguments alone.
    Where a version of transformers no longer looks these names up, this changes nothing.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reader

    with ExitStack() as stack:
        for name in ("GGUFReader", "get_tensor_name_map"):
            _replace(stack, gguf, name, functools.cache(getattr(gguf, name)))
        if hasattr(reader, "tqdm"):  # This bar does not follow the switch of transformers.
            _replace(stack, reader, "tqdm", lambda tensors, **_: tensors)
        yield


def _replace(stack: ExitStack, module: Any, name: str, value: Any) -> None:
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)
