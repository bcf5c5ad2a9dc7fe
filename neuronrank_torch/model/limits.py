"""What a model has room for."""

from __future__ import annotations

from typing import Any

from neuronrank_core.errors import InputError, InvalidValueError


def check_tokens(model: Any, sequences: Any) -> None:
    """Refuse sequences that a model has no embedding or no position for.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    sequences : int64 ndarray or Tensor, shape (sequences, seqlen)

    Raises
    ------
    InputError
        Names the token, or the length and what the model's configuration allows.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    top = int(sequences.max()) if len(sequences) else 0  # Of several ranks, one may have none.
    # Out of range, an embedding reads beyond its table: on CUDA that ends the whole process's use of the device.
    if top >= vocabulary:
        raise InputError(
            f"token {top} is outside the model's vocabulary of {vocabulary}",
            hint="use the tokenizer that belongs to the model",
        )
    check_positions(model, sequences.shape[1])


def check_positions(model: Any, tokens: int, before: int = 0, field: str = "seqlen") -> None:
    """Refuse a sequence beyond the model's positions, where a model answers with nonsense, or not at all.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokens : int
        Length asked for.
    before : int
        Tokens that stand before those.
    field : str
        What asked for it.

    Raises
    ------
    InvalidValueError
        Names what the model's configuration allows.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and before + tokens > positions:
        allowed = f"[2, {positions}]" if before == 0 else f"[0, {positions - before}] after a prompt of {before} tokens"
        raise InvalidValueError(field, tokens, allowed, hint="the model has max_position_embeddings no larger")
