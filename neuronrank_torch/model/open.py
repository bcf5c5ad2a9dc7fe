"""Loading a causal language model from a folder, a GGUF file or the hub, with one-line errors for what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights

from neuronrank_core.errors import InputError, InvalidValueError, NeuronRankError, first_line
from neuronrank_torch.model.device import check_device
from neuronrank_torch.model.folder import check_folder, check_size
from neuronrank_torch.model.gguf import (
    GgufWeights,
    gguf_shapes,
    load_gguf,
    load_gguf_tokenizer,
    readers_that_remember,
)
from neuronrank_torch.model.quiet import quiet_transformers
from neuronrank_torch.model.source import ModelSource, _locate
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
        Of the weights in memory; ``auto`` is the checkpoint's own, and float32 for a GGUF file.
    device : str or torch.device
        Where the model goes.

    Returns
    -------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    source : ModelSource

    Raises
    ------
    InputError
        If there is no such model, or it is incomplete, corrupt, quantised or in need of code of its own.
    """
    if dtype != "auto" and dtype not in _DTYPES:
        raise InvalidValueError("dtype", dtype, f"auto, {', '.join(_DTYPES)}")
    target = check_device(device)
    kind, path = _locate(spec)
    with quiet_transformers(), _as_input_error(spec), readers_that_remember():
        if kind == "gguf":
            _checked_config(spec, kind, path)
            model, tokenizer, info = load_gguf(path, _DTYPES.get(dtype, torch.float32))
        else:
            check_folder(path)
            tokenizer = _load_tokenizer(path)
            _checked_config(spec, kind, path)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                dtype=_DTYPES.get(dtype, "auto"),
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # Reported by _check_complete, by name.
                output_loading_info=True,
            )
        _check_complete(spec, info)
    return model.to(target), tokenizer, ModelSource(spec, kind, path, model.config.model_type)


def open_model(
    spec: str, *, dtype: Dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[StreamedModel, Any, ModelSource]:
    """Open a model whose weights stay on disk until they are asked for, and load its tokenizer.

    A checkpoint whose tensors are not those of the model by name and shape, so that transformers has to convert them,
    is loaded whole instead; what is wrong with a broken one is found that way too.

    Parameters
    ----------
    spec, dtype, device
        As :func:`load_model`.

    Returns
    -------
    model : StreamedModel
        With the same parameters and buffers, bit by bit, as :func:`load_model` gives.
    tokenizer : transformers.PreTrainedTokenizerBase
    source : ModelSource

    Raises
    ------
    InputError
        As :func:`load_model`.
    """
    if dtype != "auto" and dtype not in _DTYPES:
        raise InvalidValueError("dtype", dtype, f"auto, {', '.join(_DTYPES)}")
    target = check_device(device)
    kind, path = _locate(spec)
    with quiet_transformers(), _as_input_error(spec), readers_that_remember():
        if kind == "gguf":
            tokenizer = load_gguf_tokenizer(path)
        else:
            check_folder(path)
            tokenizer = _load_tokenizer(path)
        model = _skeleton(_checked_config(spec, kind, path), kind, path, dtype)
        weights = _weights(kind, path, model)
    if weights is None or not weights.fit(model):
        model, tokenizer, _ = load_model(spec, dtype=dtype)
        weights = LoadedWeights(model)
    return StreamedModel(model, weights, target), tokenizer, ModelSource(spec, kind, path, model.config.model_type)


def _weights(kind: str, path: Path, model: Any) -> WeightSource | None:
    """The model's weights one by one, where this version of transformers knows how to."""
    try:
        return GgufWeights(path, model) if kind == "gguf" else whole_experts(SafetensorsWeights(shards(path)))
    except (ImportError, AttributeError, NotImplementedError):
        return None


def _checked_config(spec: str, kind: str, path: Path) -> Any:
    """A model's configuration, which goes with its weights."""
    if kind == "gguf":
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        check_size(spec, config, gguf_shapes(path))
    else:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_size(spec, config, SafetensorsWeights(shards(path)).shapes().values())
    return config


def _skeleton(config: Any, kind: str, path: Path, dtype: Dtype) -> Any:
    """A model in eval mode with its parameters on the meta device and its buffers in memory."""
    if kind == "gguf":
        chosen: torch.dtype | None = _DTYPES.get(dtype, torch.float32)
    else:
        chosen = _DTYPES.get(dtype) or config.dtype or SafetensorsWeights(shards(path)).first_dtype()
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False)
    model.tie_weights()  # Parameters that share their weight were moved to the meta device one by one.
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model.eval()


def _load_tokenizer(folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Each kind of tokenizer fails in its own way.
        raise InputError(
            f"{folder} has no usable tokenizer: {first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error


def _check_complete(spec: str, info: dict[str, Any]) -> None:
    """Refuse a model of which transformers filled a part with random numbers. Tied weights are not among them."""
    wrong = sorted(info["missing_keys"]) or sorted(str(key[0]) for key in info["mismatched_keys"])
    if wrong:
        what = "lacks" if info["missing_keys"] else "does not fit its config.json in"
        more = f" and {len(wrong) - 1} more weights" if len(wrong) > 1 else ""
        raise InputError(f"{spec} {what} {wrong[0]}{more}", hint="the checkpoint is incomplete: download it again")


@contextmanager
def _as_input_error(spec: str) -> Iterator[None]:
    """What transformers and its readers raise on a bad model has no common class; give it ours."""
    try:
        yield
    except (NeuronRankError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"cannot load {spec}: {first_line(error)}", hint="check that the model is complete") from error
