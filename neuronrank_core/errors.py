"""Errors shown to the user: a one-line message that states the problem, and a hint that suggests a fix."""

from typing import Any


class NeuronRankError(Exception):
    """Base class of all errors that NeuronRank raises.

    Parameters
    ----------
    message : str
        The problem, in one line.
    hint : str, optional
        A possible fix, in one line.
    """

    #: Exit code of the command line: 1 for a run that failed, 2 for wrong input.
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class InputError(NeuronRankError, ValueError):
    """User input (file, text, model, flag) that cannot be used."""

    exit_code = 2


class UnreachableError(InputError):
    """A goal that turned out, after measuring, to be out of reach: the same run would fail again."""


class InvalidValueError(InputError):
    """A value outside its allowed range; names the field, the value and the range.

    Parameters
    ----------
    field : str
        Name of the field, as in :class:`neuronrank_core.Recipe`.
    value : object
        The rejected value.
    allowed : str
        The allowed range in words or interval notation.
    """

    def __init__(self, field: str, value: Any, allowed: str, *, hint: str = "") -> None:
        super().__init__(f"{field} is {value!r}, allowed: {allowed}", hint=hint)
        self.field, self.value, self.allowed = field, value, allowed


class UnsupportedModelError(InputError):
    """A model that transformers can run but NeuronRank cannot prune."""

    def __init__(
        self, message: str, *, hint: str = "this model is not supported; the documentation lists those that are"
    ) -> None:
        super().__init__(message, hint=hint)


class NonFiniteError(NeuronRankError, ArithmeticError):
    """NaN or Inf in weights, signals or scores."""


class AllZeroMetricError(NeuronRankError):
    """Every score of a comparison is zero, so the scores define no ranking."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"All-zero metric in {where}",
            hint="increase --nsamples, lower --nr-q-active, or check the calibration data",
        )


class MissingStatisticsError(NeuronRankError):
    """A layer without the statistics its method needs."""

    exit_code = 2

    def __init__(self, layer: int | str, detail: str = "", hint: str = "") -> None:
        super().__init__(
            f"No TF-IDF statistics for layer {layer}" + (f": {detail}" if detail else ""),
            hint=hint
            or "ensure the model has `layer.mlp.gate_proj` (or another known MLP) in every decoder layer; the"
            " documentation lists the supported models",
        )


def add_note(error: BaseException, note: str) -> None:
    """Add a note for the user to an exception (PEP 678; Python 3.10 has no ``add_note``)."""
    error.__notes__ = [*getattr(error, "__notes__", []), note]  # type: ignore[attr-defined]


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or the name of its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
