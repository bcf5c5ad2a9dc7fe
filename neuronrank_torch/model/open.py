"""Opens a model by its name: loaded whole, or with weights that are read from disk when they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights

from neuronrank_core.errors import InputError, InvalidValueError, NeuronRankError, first_line
from neuronrank_torch.model.device import check_device, choose_device
from neuronrank_torch.model.folder import check_folder, check_size
from neuronrank_torch.model.gguf import GgufWeights, gguf_shapes, load_gguf, load_gguf_tokenizer
from neuronrank_torch.model.quiet import quiet_transformers
from neuronrank_torch.model.source import ModelSource, locate
from neuronrank_torch.model.split_experts import whole_experts
from neuronrank_torch.model.streaming import StreamedModel
from neuronrank_torch.model.tensor_files import shards
from neuronrank_torch.model.weights import LoadedWeights, SafetensorsWeights, WeightSource

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(spec: str, *, dtype: Dtype = "auto", device: str | torch.device = "cpu") -> tuple[Any, Any, ModelSource]:
    """Load a model in eval mode, and its tokenizer.

    Parameters
    ----------
    spec : str
        A Hugging Face folder (safetensors), a ``.gguf`` file, ``builtin:smollm2-135m``, or a hub name.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Precision of the weights in memory; ``auto`` is that of the checkpoint, and float32 for a GGUF file.
    device : str or torch.device
        Device of the model; ``auto`` is CUDA if available, otherwise the CPU.

    Returns
    -------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    source : ModelSource

    Raises
    ------
    InputError
        If the model is not found, or is incomplete, corrupt, quantised or needs custom code.
    InvalidValueError
        If ``dtype`` is not one of the above.
    """
    target = _check(dtype, device)
    kind, path = locate(spec)
    with _reading(spec, kind):
        tokenizer, _ = _tokenizer_and_config(spec, kind, path)
        model = _load_whole(spec, kind, path, dtype)
    return model.to(target), tokenizer, ModelSource(spec, kind, path, model.config.model_type)


def open_model(
    spec: str, *, dtype: Dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[StreamedModel, Any, ModelSource]:
    """Open a model whose weights stay on disk until they are needed, and load its tokenizer.

    If the tensors of the checkpoint differ from the model's in name or shape, the model is loaded whole instead:
    transformers either converts them, or says what is wrong with them.

    Parameters
    ----------
    spec, dtype, device
        As :func:`load_model`.

    Returns
    -------
    model : StreamedModel
        Its parameters and buffers equal those of :func:`load_model` bit for bit.
    tokenizer : transformers.PreTrainedTokenizerBase
    source : ModelSource

    Raises
    ------
    InputError
        As :func:`load_model`.
    """
    target = _check(dtype, device)
    kind, path = locate(spec)
    with _reading(spec, kind):
        tokenizer, config = _tokenizer_and_config(spec, kind, path)
        model = _skeleton(config, kind, path, dtype)
        weights = _weights(kind, path, model)
        if weights is None or not weights.fit(model):
            model = _load_whole(spec, kind, path, dtype)
            weights = LoadedWeights(model)
    return StreamedModel(model, weights, target), tokenizer, ModelSource(spec, kind, path, model.config.model_type)


def _check(dtype: Dtype, device: str | torch.device) -> torch.device:
    if dtype != "auto" and dtype not in _DTYPES:
        raise InvalidValueError("dtype", dtype, f"auto, {', '.join(_DTYPES)}")
    return check_device(choose_device(device) if isinstance(device, str) else device)


@contextmanager
def _reading(spec: str, kind: str) -> Iterator[None]:
    """Context for calls to transformers: silent, a GGUF file parsed once, every error an InputError."""
    try:
        with quiet_transformers(), _readers(kind):
            yield
    except (NeuronRankError, MemoryError):
        raise
    except Exception as error:  # What transformers and its readers raise on a bad model has no common base class.
        raise InputError(
            f"cannot load {spec}: {first_line(error)}", hint="check that the model's files are complete"
        ) from error


def _readers(kind: str) -> AbstractContextManager[None]:
    if kind != "gguf":
        return nullcontext()
    from neuronrank_torch.model.gguf_internals import cached_readers

    return cached_readers()


def _tokenizer_and_config(spec: str, kind: str, path: Path) -> tuple[Any, Any]:
    """The tokenizer and the configuration, after a check that the weights fit the configuration's size."""
    if kind == "gguf":
        tokenizer = load_gguf_tokenizer(path)
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        check_size(spec, config, gguf_shapes(path))
    else:
        check_folder(path)
        tokenizer = _load_tokenizer(path)
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_size(spec, config, SafetensorsWeights(shards(path)).shapes().values())
    return tokenizer, config


def _load_whole(spec: str, kind: str, path: Path, dtype: Dtype) -> Any:
    if kind == "gguf":
        model, info = load_gguf(path, _DTYPES.get(dtype, torch.float32))
    else:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=_DTYPES.get(dtype, "auto"),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # _check_complete reports them by name.
            output_loading_info=True,
        )
    _check_complete(spec, info)
    return model


def _weights(kind: str, path: Path, model: Any) -> WeightSource | None:
    """The model's weights one by one; None if this version of transformers does not support that."""
    try:
        return GgufWeights(path, model) if kind == "gguf" else whole_experts(SafetensorsWeights(shards(path)))
    except (ImportError, AttributeError, NotImplementedError):
        return None


def _skeleton(config: Any, kind: str, path: Path, dtype: Dtype) -> Any:
    """A model in eval mode with its parameters on the meta device and its buffers in memory."""
    if kind == "gguf":
        chosen: torch.dtype | None = _DTYPES.get(dtype, torch.float32)
    else:
        chosen = _DTYPES.get(dtype) or config.dtype or SafetensorsWeights(shards(path)).first_dtype()
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False)
    model.tie_weights()  # Moving parameters to the meta device one by one has untied them.
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model.eval()


def _load_tokenizer(folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Tokenizers raise all kinds of errors.
        raise InputError(
            f"{folder} has no usable tokenizer: {first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error


def _check_complete(spec: str, info: dict[str, Any]) -> None:
    """Refuse a model some of whose weights transformers initialised at random. Tied weights do not count."""
    wrong = sorted(info["missing_keys"]) or sorted(str(key[0]) for key in info["mismatched_keys"])
    if wrong:
        what = "lacks" if info["missing_keys"] else "does not match its config.json in"
        more = f" and {len(wrong) - 1} more weights" if len(wrong) > 1 else ""
        raise InputError(f"{spec} {what} {wrong[0]}{more}", hint="the checkpoint is incomplete: download it again")
