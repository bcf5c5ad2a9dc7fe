"""Opens a model by its name: loaded whole, or with weights that are read from disk when they are needed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights
from transformers.core_model_loading import build_glob_alternation

from neuronrank_core.errors import InputError, InvalidValueError, NeuronRankError, first_line
from neuronrank_torch.model.converted import ConvertedWeights
from neuronrank_torch.model.device import check_device
from neuronrank_torch.model.folder import check_folder, check_size
from neuronrank_torch.model.gguf import GgufWeights, gguf_dtype, gguf_license, gguf_shapes
from neuronrank_torch.model.quantised import FORMATS, Dequantised, take_quantisation
from neuronrank_torch.model.quiet import quiet_transformers
from neuronrank_torch.model.source import ModelSource, locate
from neuronrank_torch.model.streaming import StreamedModel
from neuronrank_torch.model.tensor_files import shards, stored_dtype
from neuronrank_torch.model.weights import LoadedWeights, SafetensorsWeights, WeightSource, stored_tensors

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(spec: str, *, dtype: Dtype = "auto", device: str | torch.device = "cpu") -> tuple[Any, Any, ModelSource]:
    """Load a model in eval mode, and its tokenizer.

    Parameters
    ----------
    spec : str
        A Hugging Face folder (safetensors), a ``.gguf`` file, ``builtin:smollm2-135m``, or a hub name.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Precision of the weights in memory; ``auto`` is that of the checkpoint, and float32 for a GGUF file.
    device : str or torch.device
        Device of the model; ``auto`` is CUDA if available, otherwise the CPU.

    Returns
    -------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    source : ModelSource

    Raises
    ------
    InputError
        If the model is not found, is incomplete or corrupt, needs custom code, or is quantised in another format
        than FP8 and MXFP4.
    InvalidValueError
        If ``dtype`` is not one of the above.
    """
    return _open(spec, dtype, device, streamed=False)


def open_model(
    spec: str, *, dtype: Dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[StreamedModel, Any, ModelSource]:
    """Open a model whose weights stay on disk until they are needed, and load its tokenizer.

    If the tensors of the checkpoint, converted as transformers does, differ from the model's in name or shape, the
    model is loaded whole instead: transformers either accepts them, or says what is wrong with them.

    Parameters
    ----------
    spec, dtype, device
        As :func:`load_model`.

    Returns
    -------
    model : StreamedModel
        Its parameters and buffers equal those of :func:`load_model` bit for bit.
    tokenizer : transformers.PreTrainedTokenizerBase
    source : ModelSource

    Raises
    ------
    InputError
        As :func:`load_model`.
    """
    return _open(spec, dtype, device, streamed=True)


def _open(spec: str, dtype: Dtype, device: str | torch.device, *, streamed: bool) -> tuple[Any, Any, ModelSource]:
    if dtype not in ("auto", *_DTYPES):
        raise InvalidValueError("dtype", dtype, f"auto, {', '.join(_DTYPES)}")
    target = check_device(device)
    kind, path = locate(spec)
    with _reading(spec, kind):
        if kind != "gguf":
            check_folder(path)
        tokenizer = _load_tokenizer(kind, path)
        config = transformers.AutoConfig.from_pretrained(**_place(kind, path))
        stored = None if kind == "gguf" else _stored(path, config, dtype)
        check_size(spec, config, gguf_shapes(path) if stored is None else stored.shapes().values())
        weights: WeightSource | None = None
        if streamed:
            model, weights = _skeleton(config, path, dtype, stored)
        stored_as = gguf_dtype(path) if stored is None else stored_dtype(shards(path))
        licence = gguf_license(path) if stored is None else ""
        layout = weights
        if weights is None or not weights.fit(model):
            dense = stored if isinstance(stored, Dequantised) else None
            model = _load_whole(spec, kind, path, dtype, config, dense)
            weights = LoadedWeights(model)
    opened = StreamedModel(model, weights, target, layout) if streamed else model.to(target)
    notes = stored.notes if isinstance(stored, Dequantised) else ()
    return opened, tokenizer, ModelSource(spec, kind, path, model.config.model_type, notes, stored_as, licence)


@contextmanager
def _reading(spec: str, kind: str) -> Iterator[None]:
    """Context for calls to transformers: silent, a GGUF file parsed once, every error an InputError."""
    try:
        with quiet_transformers(), _readers(kind):
            yield
    except (NeuronRankError, MemoryError):
        raise
    except Exception as error:  # What transformers and its readers raise on a bad model has no common base class.
        raise InputError(
            f"cannot load {spec}: {first_line(error)}", hint="check that the model's files are complete"
        ) from error


def _readers(kind: str) -> AbstractContextManager[None]:
    if kind != "gguf":
        return nullcontext()
    from neuronrank_torch.model.gguf_internals import cached_readers

    return cached_readers()


def _place(kind: str, path: Path) -> dict[str, Any]:
    """What tells ``from_pretrained`` of transformers which model to read."""
    file = {"gguf_file": path.name} if kind == "gguf" else {}
    return {"pretrained_model_name_or_path": path.parent if file else path, "trust_remote_code": False, **file}


def _stored(path: Path, config: Any, dtype: Dtype) -> SafetensorsWeights | Dequantised:
    """The tensors of a folder, dequantised. The configuration becomes that of an unquantised model and gets a dtype."""
    stored = SafetensorsWeights(shards(path))
    settings = take_quantisation(path, config)
    config.dtype = config.dtype or (stored.first_dtype() if settings is None else torch.bfloat16)
    if settings is None:
        return stored
    return FORMATS[settings["quant_method"]](path, stored, settings, _DTYPES.get(dtype, config.dtype))


def _load_whole(spec: str, kind: str, path: Path, dtype: Dtype, config: Any, dense: Dequantised | None) -> Any:
    loader, place = transformers.AutoModelForCausalLM, _place(kind, path)
    if dense is not None:
        # Not dequantised by transformers itself, which gets incomplete blocks wrong.
        tensors = {name: dense.tensor(name) for name in dense.shapes()}
        options = {"dtype": dense.dtype, "ignore_mismatched_sizes": True, "config": config, "state_dict": tensors}
        with torch.device("meta"):  # Only the model's own class takes tensors.
            loader = type(loader.from_config(config))
        place = {"pretrained_model_name_or_path": None}
    elif kind != "gguf":
        # Weights of another size are reported below, by name.
        options = {"dtype": _DTYPES.get(dtype, "auto"), "use_safetensors": True, "ignore_mismatched_sizes": True}
    else:
        options = {"dtype": _DTYPES.get(dtype, torch.float32)}
        if hasattr(transformers, "GgufConfig"):
            # Where a matmul kernel is installed, newer versions would otherwise keep the weights packed.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = loader.from_pretrained(**place, **options, output_loading_info=True)
    if dense is not None:
        _set_generation(model, path)
    # Refuse weights that transformers initialised at random. Tied weights do not count.
    wrong = sorted(info["missing_keys"]) or sorted(str(key[0]) for key in info["mismatched_keys"])
    if wrong:
        what = "lacks" if info["missing_keys"] else "does not match its config.json in"
        more = f" and {len(wrong) - 1} more weights" if len(wrong) > 1 else ""
        raise InputError(f"{spec} {what} {wrong[0]}{more}", hint="the checkpoint is incomplete: download it again")
    return model


def _skeleton(
    config: Any, path: Path, dtype: Dtype, stored: SafetensorsWeights | Dequantised | None
) -> tuple[Any, WeightSource | None]:
    """A model in eval mode with its parameters on the meta device and its buffers in memory; its weights one by one.

    The weights of a GGUF file (``stored`` is None) are None if this version of transformers does not support that.
    """
    chosen = _DTYPES.get(dtype, torch.float32 if stored is None else config.dtype)
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False)
    model.tie_weights()  # Moving parameters to the meta device one by one has untied them.
    _keep_in_float32(model, chosen)
    _set_generation(model, path)
    if stored is not None:
        return model.eval(), ConvertedWeights(stored, model)
    try:
        return model.eval(), GgufWeights(path, model)
    except (ImportError, AttributeError, NotImplementedError):
        return model, None


def _set_generation(model: Any, path: Path) -> None:
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Give those tensors the precision float32 that ``from_pretrained`` keeps in it if the model is in ``dtype``."""
    if plan := model._get_dtype_plan(dtype):
        pattern = build_glob_alternation(list(plan))[0]
        for name, tensor in stored_tensors(model).items():
            if pattern.search(name):
                tensor.data = tensor.data.float()


def _load_tokenizer(kind: str, path: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(**_place(kind, path))
    except Exception as error:  # Tokenizers raise all kinds of errors.
        if kind == "gguf":
            raise
        raise InputError(
            f"{path} has no usable tokenizer: {first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error
