"""What to tell a user about an exception: one line, a hint and an exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from neuronrank_core import InvalidValueError, NeuronRankError

#: Fields that errors name otherwise than the commands do.
_SAME = {"topics": "tfidf_k", "windows": "eval_windows"}
#: What allocators of torch and the operating system say, beside exceptions of their own.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory", "ALLOC_FAILED")
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True)
class Failure:
    """The end of a run that did not succeed."""

    message: str
    hint: str
    exit_code: int


def explain(error: Exception, flags: Mapping[str, str]) -> Failure:
    """Put an exception in a user's words.

    Parameters
    ----------
    error : Exception
        Raised on purpose or not.
    flags : mapping
        The command's flags by the field they set.

    Returns
    -------
    Failure
    """
    if any(_out_of_memory(cause) for cause in _chain(error)):
        smaller = ", ".join(flags[name] for name in ("batch_size", "nsamples", "seqlen") if name in flags)
        disk = "keep hidden states in a file with --save and --hidden-states disk; " if "hidden_states" in flags else ""
        return Failure(f"out of memory: {_first_line(error)}", f"lower {smaller}; {disk}or try another --device", 1)
    if isinstance(error, InvalidValueError):
        field = error.field if error.field in flags else _SAME.get(error.field, error.field)
        message = f"{flags.get(field, field)} is {error.value!r}, allowed: {error.allowed}"
        return Failure(message, error.hint or "--help says what each flag is for", error.exit_code)
    if isinstance(error, NeuronRankError):
        return Failure(_first_line(error), error.hint, error.exit_code)
    if isinstance(error, OSError):
        hint = "free some space" if error.errno in _FULL else "check the path and its permissions"
        return Failure(_first_line(error), hint, 1)
    hint = "not foreseen, so please report it, with what NEURONRANK_DEBUG=1 in the environment adds"
    return Failure(f"{type(error).__name__}: {_first_line(error)}", hint, 1)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _out_of_memory(error: BaseException) -> bool:
    # By name: torch takes seconds to import, and where it was not there is no such error.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return not isinstance(error, NeuronRankError) and any(words in str(error) for words in _NO_MEMORY)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:500] if lines else type(error).__name__
