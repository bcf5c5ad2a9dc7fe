"""Turns text into sequences of tokens: tokenises it, draws calibration sequences, cuts evaluation windows."""

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
#: More characters per token than any tokenizer has on average: a text this much longer need not be tokenised.
CHARACTERS = 16


def tokenize(tokenizer: Any, text: str) -> Tokens:
    """Encode a text as one string, without the special tokens that a tokenizer adds around it.

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
        If the tokenizer gives no tokens.
    """
    # verbose=False: a text longer than the model's context is normal here and needs no warning.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    stream = np.asarray(encoded["input_ids"], dtype=np.int64)
    if stream.size == 0:
        raise InputError("the text is empty: it has no tokens", hint="choose another file or dataset")
    return stream


def bos_token(tokenizer: Any) -> int | None:
    """The beginning-of-sequence (BOS) id, if this tokenizer puts it before a text by default.

    Many tokenizers define a BOS token but never use it. Models of those families did not see it in training, so the
    tokenizer's output decides, not its attribute.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Any tokenizer of transformers.

    Returns
    -------
    int or None
        None if the tokenizer does not use a BOS token.
    """
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and len(ids) > 0 and ids[0] == bos else None


def check_room(sequences: int, tokens: int) -> None:
    """Raise MemoryError if the tokens exceed the address space; NumPy and torch would raise less clear errors."""
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
        Number of sequences, and tokens per sequence, including the BOS token.
    seed : int
        Seed of ``numpy.random.default_rng``. With the same seed, a larger draw starts with the smaller one.
    bos : int or None
        BOS id from :func:`bos_token`.
    bos_mode : {"window", "text"}
        Whether the BOS token is put before every sequence, or before the text only.

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
    last = stream.size - slice_length
    offsets = np.random.default_rng(seed).integers(0, last + 1, size=nsamples)
    if prefix.size:  # A slice that starts with a BOS token gets no second one.
        offsets += stream[offsets] == bos
        offsets[offsets > last] = max(last - 1, 0)
    return _prepend(prefix, stream[offsets[:, None] + np.arange(slice_length)])


def cut_windows(stream: Tokens, *, seqlen: int, windows: int | None, bos: int | None, bos_mode: BosMode) -> Tokens:
    """Cut a text into consecutive windows for perplexity; the remainder is dropped.

    Parameters
    ----------
    stream : ndarray of int64, shape (tokens,)
        The text, from :func:`tokenize`.
    seqlen : int
        Tokens per window, including the BOS token.
    windows : int or None
        Number of windows, from the start of the text; None for all.
    bos : int or None
        BOS id from :func:`bos_token`.
    bos_mode : {"window", "text"}
        Whether the BOS token is put before every window, or before the text only.

    Returns
    -------
    ndarray of int64, shape (windows, seqlen)

    Raises
    ------
    InputError
        If the text has no windows or fewer than requested, or a number is out of range.
    """
    if windows is not None and windows < 1:
        raise InvalidValueError("windows", windows, "an integer >= 1")
    stream, prefix = _prepare(stream, seqlen, bos, bos_mode)
    slice_length = seqlen - prefix.size
    starts = _consecutive(stream, slice_length, bos if prefix.size else None)
    available = len(starts)
    count = max(1, available) if windows is None else windows
    if count > available:
        raise InputError(
            f"{count} windows of {seqlen} tokens requested, but the text has {available}",
            hint="request fewer windows, lower --seqlen, or use a longer text",
        )
    return _prepend(prefix, stream[starts[:count, None] + np.arange(slice_length)])


def _prepare(stream: Tokens, seqlen: int, bos: int | None, bos_mode: BosMode) -> tuple[Tokens, Tokens]:
    """The stream to cut, long enough for one slice, and the prefix of each slice: the BOS token or nothing."""
    if seqlen < 2:
        raise InvalidValueError("seqlen", seqlen, "an integer >= 2")
    begin = np.array([] if bos is None else [bos], dtype=np.int64)
    prefix = begin if bos_mode == "window" else begin[:0]
    if stream[0] == bos:  # Written by a chat template.
        stream = stream[1:]
    if bos_mode == "text":
        stream = np.concatenate([begin, stream])
    if stream.size < seqlen - prefix.size:
        raise InputError(
            f"the text has {stream.size} tokens, but one sequence needs {seqlen - prefix.size}",
            hint="lower --seqlen, or use a longer text",
        )
    return stream, prefix


def _consecutive(stream: Tokens, length: int, bos: int | None) -> Tokens:
    """Starts of consecutive slices; a BOS token is skipped where a slice would start with it."""
    starts, start = [], 0
    while (start := start + int(start < stream.size and stream[start] == bos)) + length <= stream.size:
        starts.append(start)
        start += length
    return np.array(starts, dtype=np.int64)


def _prepend(prefix: Tokens, slices: Tokens) -> Tokens:
    return np.concatenate([np.broadcast_to(prefix, (len(slices), prefix.size)), slices], axis=1)


def evaluation_windows(tokenizer: Any, text: str, *, seqlen: int, windows: int | None, bos_mode: BosMode) -> Tokens:
    """Cut a text into windows for perplexity: int64, shape (windows, seqlen); raises as :func:`cut_windows`."""
    stream, bos = tokenize(tokenizer, text), bos_token(tokenizer)
    return cut_windows(stream, seqlen=seqlen, windows=windows, bos=bos, bos_mode=bos_mode)


def micro_batch(recipe: Recipe) -> int:
    """Default number of sequences in a micro-batch: about 2048 tokens, at least one sequence."""
    return max(1, 2048 // recipe.seqlen)


def calibration_sequences(tokenizer: Any, recipe: Recipe, text: str) -> Tensor:
    """Draw the calibration sequences of a recipe: int64, shape (nsamples, seqlen); raises as :func:`draw_sequences`."""
    stream, bos = tokenize(tokenizer, text), bos_token(tokenizer)
    drawn = draw_sequences(
        stream, nsamples=recipe.nsamples, seqlen=recipe.seqlen, seed=recipe.seed, bos=bos, bos_mode=recipe.bos
    )
    return torch.as_tensor(drawn)
