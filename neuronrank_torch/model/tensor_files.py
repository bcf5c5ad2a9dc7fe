"""safetensors files: found in a folder, read, written one by one, then joined or indexed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from neuronrank_core.errors import InputError
from neuronrank_torch.files.json import read_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Header fields that transformers requires.
_METADATA = {"format": "pt"}


def write_shard(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors, from any device, to a safetensors file by their names."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file, metadata=_METADATA)


def write_index(shards: list[Path], folder: Path) -> None:
    """Write the index that tells transformers which shard of a folder holds which tensor."""
    where: dict[str, str] = {}
    total = 0
    for shard in shards:
        tensors, begin = read_header(shard)
        where |= dict.fromkeys(tensors, shard.name)
        total += shard.stat().st_size - begin
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def join_shards(shards: list[Path], folder: Path) -> None:
    """Join shards whose tensors all have the same precision into one file, without loading them into memory."""
    header: dict[str, object] = {"__metadata__": _METADATA}
    begin = 0
    for shard in shards:
        tensors, _ = read_header(shard)
        for name, tensor in tensors.items():
            header[name] = {**tensor, "data_offsets": [begin + offset for offset in tensor["data_offsets"]]}
        begin += max(tensor["data_offsets"][1] for tensor in tensors.values())
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # The format requires the data to start at a multiple of 8.
    with (folder / SINGLE).open("wb") as joined:
        joined.write(len(encoded).to_bytes(8, "little") + encoded)
        for shard in shards:
            with shard.open("rb") as stream:
                stream.seek(read_header(shard)[1])
                shutil.copyfileobj(stream, joined, 1 << 20)


def read_header(shard: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Header entries of a safetensors file by tensor name, and the offset in bytes at which the data starts."""
    with shard.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        tensors = json.loads(stream.read(length))
    tensors.pop("__metadata__", None)
    return tensors, 8 + length


def stored_dtype(shards: Sequence[Path]) -> str:
    """Precision of most of the bytes in safetensors files: that of torch by its name, otherwise as in the files."""
    sizes: dict[str, int] = {}
    for shard in shards:
        for tensor in read_header(shard)[0].values():
            begin, end = tensor["data_offsets"]
            sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - begin
    most = max(sizes, key=lambda name: sizes[name], default="")
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(most, most)


def shards(folder: Path) -> list[Path]:
    """The weight files that transformers reads, empty if there are none; raises InputError for a bad index."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    weights = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{folder / INDEX} lists no weights", hint="download the model again")
    for name in weights.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{folder / INDEX} refers to a file outside its folder: {name}", hint="do not trust this model"
            )
    return [folder / name for name in sorted(set(weights.values()))]
