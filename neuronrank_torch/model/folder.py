"""Checks of a model's folder, so that errors name what is missing or broken."""

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

_TOO_LARGE = "the checkpoint is incomplete or its config.json is wrong: download it again"


def check_folder(folder: Path) -> None:
    """Refuse a folder that lacks the files of a model or has broken ones.

    Parameters
    ----------
    folder : pathlib.Path

    Raises
    ------
    InputError
        Names what is missing or broken.
    """
    names = [file.name for file in folder.iterdir()]
    if not names:
        raise InputError(f"{folder} is empty", hint="give the path of a model folder")
    if "config.json" not in names:
        gguf = [name for name in names if name.endswith(".gguf")]
        hint = f"give the path of the GGUF file: {folder / gguf[0]}" if gguf else "give the path of a model folder"
        raise InputError(f"{folder} has no config.json", hint=hint)
    config = read_json(folder / "config.json")
    files = shards(folder)
    if not files:
        if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            raise InputError(
                f"{folder} has its weights in pickle files, which can run code when loaded",
                hint="convert them to safetensors: huggingface.co/docs/safetensors/convert-weights",
            )
        raise InputError(f"{folder} has no weights (*.safetensors)", hint="give the path of a complete model folder")
    tensors = sum(map(_check_shard, files))
    for part in (config, config.get("text_config")):
        # Before transformers builds lists of this length.
        _check_depth(str(folder), part.get("num_hidden_layers") if isinstance(part, dict) else None, tensors)


def _check_shard(shard: Path) -> int:
    """Number of tensors in a file; raises InputError if it is missing or broken."""
    if not shard.is_file():
        raise InputError(f"{shard} is missing, but the index refers to it", hint="download the model again")
    try:
        with safe_open(shard, framework="pt") as content:
            return len(content.keys())
    except SafetensorError as error:
        raise InputError(f"{shard} is truncated or corrupt: {first_line(error)}", hint="download it again") from error


def check_size(spec: str, config: Any, shapes: Collection[tuple[int, ...]]) -> None:
    """Refuse a configuration that describes a far larger model than its weights, before any of it is built.

    Parameters
    ----------
    spec : str
        Name of the model, for the error.
    config : transformers.PreTrainedConfig
    shapes : collection of tuple of int
        Shapes of the weights in the checkpoint.

    Raises
    ------
    InputError
        If it has more layers than the checkpoint has tensors, or more than twice as many weights.
    """
    _check_depth(spec, getattr(config.get_text_config(), "num_hidden_layers", None), len(shapes))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    described = sum(parameter.numel() for parameter in model.parameters())
    held = sum(map(math.prod, shapes))
    if described > 2 * held:  # Tolerant of weights that transformers splits or shares.
        raise InputError(f"{spec} describes a model of {described:,} weights, but contains {held:,}", hint=_TOO_LARGE)


def _check_depth(spec: str, layers: Any, tensors: int) -> None:
    if isinstance(layers, int) and layers > tensors:
        raise InputError(
            f"{spec} describes a model of {layers} layers, but contains {tensors} tensors", hint=_TOO_LARGE
        )
