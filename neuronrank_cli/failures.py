"""Explains exceptions to users: one line, a hint and an exit code."""

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from neuronrank_core import InvalidValueError, NeuronRankError
from neuronrank_core.errors import first_line

#: Fields that have another name in errors than in the commands.
_SAME = {
    **{"topics": "tfidf_k", "windows": "eval_windows"},
    # Of flags that can be repeated.
    **{"method": "methods", "sparsity_ratio": "ratios", "update": "updates"},
}
#: Parts of the messages of allocators that raise a general exception.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory", "ALLOC_FAILED")
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True)
class Failure:
    """How a run failed."""

    message: str
    hint: str
    exit_code: int


def explain(error: Exception, flags: Mapping[str, str]) -> Failure:
    """Explain an exception in terms of the command line.

    Parameters
    ----------
    error : Exception
        Expected or not.
    flags : mapping
        Flags of the command by the field they set.

    Returns
    -------
    Failure
    """
    if any(_out_of_memory(cause) for cause in _chain(error)):
        smaller = ", ".join(flags[name] for name in ("batch_size", "nsamples", "seqlen") if name in flags)
        disk = "store hidden states in a file with --save and --hidden-states disk"
        ways = [
            *([f"lower {smaller}"] if smaller else []),
            *([disk] if "hidden_states" in flags else []),
            *(["try another --device"] if "device" in flags else []),
        ]
        return Failure(f"out of memory: {first_line(error)}", "; or ".join(ways) or "free some memory", 1)
    if isinstance(error, InvalidValueError):
        field = error.field if error.field in flags else _SAME.get(error.field, error.field)
        message = f"{flags.get(field, error.field)} is {error.value!r}, allowed: {error.allowed}"
        return Failure(message, error.hint or "see --help", error.exit_code)
    if isinstance(error, NeuronRankError):
        return Failure(first_line(error), error.hint, error.exit_code)
    if isinstance(error, OSError):
        hint = "free some space" if error.errno in _FULL else "check the path and its permissions"
        return Failure(first_line(error), hint, 1)
    hint = "unexpected error: please report it, with the traceback that NEURONRANK_DEBUG=1 shows"
    return Failure(f"{type(error).__name__}: {first_line(error)}", hint, 1)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes."""
    while error is not None:
        yield error
        error = error.__cause__


def _out_of_memory(error: BaseException) -> bool:
    # By name, because importing torch takes seconds.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return not isinstance(error, NeuronRankError) and any(words in str(error) for words in _NO_MEMORY)
