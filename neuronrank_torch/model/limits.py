"""Checks that a model has an embedding and a position for every token of a sequence."""

from typing import Any

import torch
from accelerate.utils import get_max_memory

from neuronrank_core.errors import InputError, InvalidValueError, UnsupportedModelError


def check_tokens(model: Any, sequences: Any) -> None:
    """Refuse sequences that exceed a model's vocabulary or its maximum length.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    sequences : int64 ndarray or Tensor, shape (sequences, seqlen)

    Raises
    ------
    InputError
        Names the token and the size of the vocabulary, the length and the allowed range, or the missing embeddings.
    """
    try:
        vocabulary = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):  # Transformers raises the latter where it cannot find them.
        raise UnsupportedModelError(f"{type(model).__name__} has no single table of input embeddings") from None
    top = int(sequences.max()) if len(sequences) else 0  # A rank may have no sequences.
    # On CUDA, reading beyond the embedding table leaves the device unusable for the rest of the process.
    if top >= vocabulary:
        raise InputError(
            f"token {top} is outside the model's vocabulary of {vocabulary}",
            hint="use the tokenizer that belongs to the model",
        )
    check_positions(model, sequences.shape[1])


def check_positions(model: Any, tokens: int, before: int = 0, field: str = "seqlen") -> None:
    """Refuse a sequence longer than the model's positions: its output would be meaningless, or it would fail.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokens : int
        Requested length.
    before : int
        Number of tokens before those.
    field : str
        Name of the setting, for the error.

    Raises
    ------
    InputError
        If the tokens before are too many already.
    InvalidValueError
        Names the range that the model's configuration allows.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and before > positions:
        raise InputError(
            f"the prompt has {before} tokens, but the model has {positions} positions", hint="shorten the prompt"
        )
    if positions is not None and before + tokens > positions:
        allowed = f"[2, {positions}]" if before == 0 else f"[0, {positions - before}] after a prompt of {before} tokens"
        raise InvalidValueError(field, tokens, allowed, hint=f"the model's max_position_embeddings is {positions}")


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Refuse to load what does not fit into the free memory of a device.

    Parameters
    ----------
    needed : int
        In bytes.
    device : torch.device
    what : str
        For the error.

    Raises
    ------
    InputError
        Names both sizes.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else get_max_memory()["cpu"]
    if needed > free:
        raise InputError(
            f"{what} needs {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are free on {device}",
            hint="use a larger machine, or --dtype bfloat16",
        )
