"""safetensors files of a saved model: written one by one, joined or indexed at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from neuronrank_torch.model_files import INDEX, SINGLE

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
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
