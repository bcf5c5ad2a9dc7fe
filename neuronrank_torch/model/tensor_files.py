"""safetensors files: found, read and written one by one, joined or indexed at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from neuronrank_core.errors import InputError
from neuronrank_torch.files.json import read_json, write_json

#: Header fields that transformers asks for.
_METADATA = {"format": "pt"}


def write_shard(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors by name, from whatever device, to a safetensors file."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file, metadata=_METADATA)


def write_index(shards: list[Path], folder: Path) -> None:
    """Write the index by which transformers finds the tensors of a folder's shards."""
    where: dict[str, str] = {}
    total = 0
    for shard in shards:
        tensors = read_header(shard)[0]
        where |= dict.fromkeys(tensors, shard.name)
        total += sum(end - start for start, end in (tensor["data_offsets"] for tensor in tensors.values()))
    index: dict[str, object] = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / INDEX, index)


def join_shards(shards: list[Path], folder: Path) -> None:
    """Join shards whose tensors all have the same precision to one file, without reading them to memory."""
    header: dict[str, object] = {"__metadata__": _METADATA}
    begin = 0
    for shard in shards:
        tensors, _ = read_header(shard)
        for name, tensor in tensors.items():
            header[name] = {**tensor, "data_offsets": [begin + offset for offset in tensor["data_offsets"]]}
        begin += max(tensor["data_offsets"][1] for tensor in tensors.values())
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # The format has the data begin at a multiple of 8.
    with (folder / SINGLE).open("wb") as joined:
        joined.write(len(encoded).to_bytes(8, "little") + encoded)
        for shard in shards:
            with shard.open("rb") as stream:
                stream.seek(read_header(shard)[1])
                shutil.copyfileobj(stream, joined, 1 << 20)


def read_header(shard: Path) -> tuple[dict[str, dict[str, list[int]]], int]:
    """What a safetensors file says of its tensors, and where their data begins."""
    with shard.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        tensors = json.loads(stream.read(length))
    tensors.pop("__metadata__", None)
    return tensors, 8 + length


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
