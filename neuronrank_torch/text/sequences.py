"""From text to sequences of tokens: tokenise, draw calibration sequences, cut windows."""

from __future__ import annotations

import sys
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuronrank_core import Recipe
from neuronrank_core.errors import InputError, InvalidValueError

BosMode = Literal["window", "text"]
Tokens = npt.NDArray[np.int64]


def tokenize(tokenizer: Any, text: str) -> Tokens:
    """Encode a whole text as one string, without the special tokens a tokenizer adds around a text.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Any tokenizer of transformers.
    text : str
        The text.

    Returns
    -------
    ndarray of int64, shape (tokens,)

    Raises
    ------
    InputError
        If the text has no tokens.
    """
    # A text longer than the model's context is the rule here, not a mistake: verbose=False drops that warning.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    stream = np.asarray(encoded["input_ids"], dtype=np.int64)
    if stream.size == 0:
        raise InputError("the text is empty: it has no tokens", hint="choose another file or dataset")
    return stream


def bos_token(tokenizer: Any) -> int | None:
    """The beginning-of-sequence id, if this tokenizer puts one before a text by itself.

    Many tokenizers define such a token and never use it. Models of those families did not see it in training, so
    what counts is behaviour, not the attribute.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Any tokenizer of transformers.

    Returns
    -------
    int or None
    """
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and len(ids) > 0 and ids[0] == bos else None


def check_room(sequences: int, tokens: int) -> None:
    """Raise MemoryError for what no address space holds; NumPy and torch would speak of dimensions and overflows."""
    if sequences * tokens > sys.maxsize // 64:
        raise MemoryError(f"{sequences} sequences of {tokens} tokens")


def draw_sequences(
    stream: Tokens, *, nsamples: int, seqlen: int, seed: int, bos: int | None, bos_mode: BosMode
) -> Tokens:
    """Cut calibration sequences at uniformly random offsets, as Wanda and SparseGPT do. They may overlap.

    Parameters
    ----------
    stream : ndarray of int64, shape (tokens,)
        The text, from :func:`tokenize`.
    nsamples, seqlen : int
        Number of sequences, and tokens in each, the beginning-of-sequence token included.
    seed : int
        Seed of ``numpy.random.default_rng``. More samples of the same seed begin with the same sequences.
    bos : int or None
        Beginning-of-sequence id from :func:`bos_token`.
    bos_mode : {"window", "text"}
        Whether it begins every sequence, or the text alone.

    Returns
    -------
    ndarray of int64, shape (nsamples, seqlen)

    Raises
    ------
    InputError
        If the text is shorter than one sequence, or a number is out of range.
    """
    if nsamples < 1:
        raise InvalidValueError("nsamples", nsamples, "an integer >= 1")
    stream, prefix = _prepare(stream, seqlen, bos, bos_mode)
    check_room(nsamples, seqlen)
    slice_length = seqlen - prefix.size
    offsets = np.random.default_rng(seed).integers(0, stream.size - slice_length + 1, size=nsamples)
    return _prepend(prefix, stream[offsets[:, None] + np.arange(slice_length)])


def cut_windows(stream: Tokens, *, seqlen: int, windows: int | None, bos: int | None, bos_mode: BosMode) -> Tokens:
    """Cut a text in consecutive windows for perplexity; the remainder is dropped.

    Parameters
    ----------
    stream : ndarray of int64, shape (tokens,)
        The text, from :func:`tokenize`.
    seqlen : int
        Tokens in each window, the beginning-of-sequence token included.
    windows : int or None
        How many to take from the start of the text; None takes all.
    bos : int or None
        Beginning-of-sequence id from :func:`bos_token`.
    bos_mode : {"window", "text"}
        Whether it begins every window, or the text alone.

    Returns
    -------
    ndarray of int64, shape (windows, seqlen)

    Raises
    ------
    InputError
        If the text has fewer windows than asked for, or none; or a number is out of range.
    """
    if windows is not None and windows < 1:
        raise InvalidValueError("windows", windows, "an integer >= 1")
    stream, prefix = _prepare(stream, seqlen, bos, bos_mode)
    slice_length = seqlen - prefix.size
    available = stream.size // slice_length
    count = available if windows is None else windows
    if count > available:
        raise InputError(
            f"{count} windows of {seqlen} tokens asked for, but the text has {available}",
            hint="ask for fewer windows, lower --seqlen, or use a longer text",
        )
    return _prepend(prefix, stream[: count * slice_length].reshape(count, slice_length))


def _prepare(stream: Tokens, seqlen: int, bos: int | None, bos_mode: BosMode) -> tuple[Tokens, Tokens]:
    """The stream to cut, and the tokens (none or one) that go before each slice; at least one slice fits."""
    if seqlen < 2:
        raise InvalidValueError("seqlen", seqlen, "an integer >= 2")
    begin = np.array([] if bos is None else [bos], dtype=np.int64)
    prefix = begin if bos_mode == "window" else begin[:0]
    if bos_mode == "text":
        stream = np.concatenate([begin, stream])
    if stream.size < seqlen - prefix.size:
        raise InputError(
            f"the text has {stream.size} tokens, one sequence needs {seqlen - prefix.size}",
            hint="lower --seqlen, or use a longer text",
        )
    return stream, prefix


def _prepend(prefix: Tokens, slices: Tokens) -> Tokens:
    return np.concatenate([np.broadcast_to(prefix, (len(slices), prefix.size)), slices], axis=1)


def micro_batch(recipe: Recipe) -> int:
    """Sequences in a micro-batch, unless told otherwise: about 2048 tokens' worth."""
    return max(1, 2048 // recipe.seqlen)


def calibration_sequences(tokenizer: Any, recipe: Recipe, text: str) -> Tensor:
    """Draw the recipe's calibration sequences, int64, shape (nsamples, seqlen)."""
    drawn = draw_sequences(
        tokenize(tokenizer, text),
        nsamples=recipe.nsamples,
        seqlen=recipe.seqlen,
        seed=recipe.seed,
        bos=bos_token(tokenizer),
        bos_mode=recipe.bos,
    )
    return torch.as_tensor(drawn)
