"""A model's folder: what is missing or broken, named before transformers does, in fewer words."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from neuronrank_core.errors import InputError, first_line
from neuronrank_torch.files.json import read_json
from neuronrank_torch.model.tensor_files import shards

_TOO_LARGE = "the checkpoint is incomplete or its config.json wrong: download it again"
_PICKLES = ("*.bin", "*.pt", "*.pth")


def check_folder(folder: Path) -> None:
    """Name what is missing or broken before transformers does, in fewer words."""
    names = [file.name for file in folder.iterdir()]
    if not names:
        raise InputError(f"{folder} is empty", hint="name the folder of a model")
    if "config.json" not in names:
        gguf = [name for name in names if name.endswith(".gguf")]
        hint = f"name the file: {folder / gguf[0]}" if gguf else "name the folder of a model"
        raise InputError(f"{folder} has no config.json", hint=hint)
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise InputError(f"{folder} holds quantised weights", hint="prune the full-precision model, then quantise it")
    files = shards(folder)
    if not files:
        if any(file for pattern in _PICKLES for file in folder.glob(pattern)):
            raise InputError(
                f"{folder} has its weights in pickle files, which can run code when they are read",
                hint="convert them to safetensors: huggingface.co/docs/safetensors/convert-weights",
            )
        raise InputError(f"{folder} has no weights (*.safetensors)", hint="name the folder of a complete model")
    tensors = sum(map(_check_shard, files))
    for part in (config, config.get("text_config")):
        # Before transformers makes lists of that length of it.
        _check_depth(str(folder), part.get("num_hidden_layers") if isinstance(part, dict) else None, tensors)


def _check_shard(shard: Path) -> int:
    """Refuse a file that is missing or broken; else say how many tensors it holds."""
    if not shard.is_file():
        raise InputError(f"{shard} is missing, though the index names it", hint="download the model again")
    try:
        with safe_open(shard, framework="pt") as content:
            return len(content.keys())
    except SafetensorError as error:
        raise InputError(f"{shard} is truncated or corrupt: {first_line(error)}", hint="download it again") from error


def check_size(spec: str, config: Any, shapes: Collection[tuple[int, ...]]) -> None:
    """Refuse a configuration of a far larger model than its weights are, before memory or hours go into building it.

    Parameters
    ----------
    spec : str
        Named in the error.
    config : transformers.PreTrainedConfig
    shapes : collection of tuple of int
        Of the weights that there are.

    Raises
    ------
    InputError
        If it has more layers than there are tensors, or more than twice as many weights.
    """
    _check_depth(spec, getattr(config.get_text_config(), "num_hidden_layers", None), len(shapes))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    described = sum(parameter.numel() for parameter in model.parameters())
    held = sum(map(math.prod, shapes))
    if described > 2 * held:  # With room for what transformers renames, splits or shares.
        raise InputError(f"{spec} describes a model of {described:,} weights, but holds {held:,}", hint=_TOO_LARGE)


def _check_depth(spec: str, layers: Any, tensors: int) -> None:
    if isinstance(layers, int) and layers > tensors:
        raise InputError(f"{spec} describes a model of {layers} layers, but holds {tensors} tensors", hint=_TOO_LARGE)
