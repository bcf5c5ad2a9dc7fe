"""The weight files of a model's folder: what is missing or broken, named before transformers does, in fewer words."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from neuronrank_core.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: How many places of a file its digest looks at, and how many bytes there.
_PLACES, _BYTES = 256, 64 << 10
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


def shards(folder: Path) -> list[Path]:
    """The weight files transformers will read; raises InputError where the index points outside the folder."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    weights = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{folder / INDEX} names no weights", hint="download the model again")
    names = weights.values()
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{folder / INDEX} names a file outside its folder: {name}", hint="do not trust this model"
            )
    return [folder / name for name in sorted(set(names))]


def _check_shard(shard: Path) -> int:
    """Refuse a file that is missing or broken; else say how many tensors it holds."""
    if not shard.is_file():
        raise InputError(f"{shard} is missing, though the index names it", hint="download the model again")
    try:
        with safe_open(shard, framework="pt") as content:
            return len(content.keys())
    except SafetensorError as error:
        raise InputError(f"{shard} is truncated or corrupt: {first_line(error)}", hint="download it again") from error


def sampled_digest(file: Path) -> str:
    """BLAKE2b of a file's size and of 64 KiB at 256 places of it, evenly strided: all of it, up to 16 MiB.

    Reading all of a large model would take as long as scoring it. Models that were trained or pruned apart differ
    nearly everywhere; this is no protection against forgery.
    """
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with file.open("rb") as stream:
        for place in range(_PLACES):
            stream.seek(place * max(size - _BYTES, 0) // (_PLACES - 1) if size > _PLACES * _BYTES else place * _BYTES)
            digest.update(stream.read(_BYTES))
    return digest.hexdigest()


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


def read_json(file: Path, hint: str = "download the model again") -> dict[str, Any]:
    """Read a JSON object; raises InputError, with this hint, where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {file}: {first_line(error)}", hint=hint) from error
    if not isinstance(content, dict):
        raise InputError(f"cannot read {file}: not a JSON object", hint=hint)
    return content


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
