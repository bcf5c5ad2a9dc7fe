"""The result of a search."""

from dataclasses import dataclass

from neuronrank_core import Recipe
from neuronrank_torch.text.sequences import BosMode


@dataclass(frozen=True)
class Trial:
    """One recipe that was measured.

    Parameters
    ----------
    number : int
        Number of the trial.
    start : str or None
        Name of the starting point; null for a recipe that the search proposed.
    perplexity : float
        On the evaluation text.
    recipe : Recipe
        With the defaults of the method filled in.
    standard_error : float or None
        Standard error of the difference between this perplexity and that of the best trial, over the windows, which
        both have in common; null for a single window, and if an earlier version measured one of them.
    """

    number: int
    start: str | None
    perplexity: float
    recipe: Recipe
    standard_error: float | None


@dataclass(frozen=True)
class Protocol:
    """How perplexities were measured.

    Parameters
    ----------
    dataset : str
        The text, as it was named.
    windows : int
        Number of windows.
    seqlen : int
        Tokens per window.
    bos : {"window", "text"} or None
        Where a beginning-of-sequence token was added.
    """

    dataset: str
    windows: int
    seqlen: int
    bos: BosMode | None


@dataclass(frozen=True)
class HeldOut(Protocol):
    """Perplexities on the test text.

    Parameters
    ----------
    perplexity : dict of float
        Of the unpruned model (``dense``), the ``best`` recipe, and of ``wanda`` and the default method if they did not
        fail.
    standard_error : dict of float
        Standard errors of their differences from the best recipe, over the windows; null for a single window.
    """

    perplexity: dict[str, float]
    standard_error: dict[str, float | None]


@dataclass(frozen=True)
class TuneResult:
    """Result of ``neuronrank tune``.

    Parameters
    ----------
    model : str
        The model, as it was named.
    stats : str
        The folder of statistics.
    validation : Protocol
        How recipes were compared.
    dense : float
        Perplexity of the unpruned model.
    best : Trial
        The trial with the lowest perplexity.
    trials : tuple of Trial
        All trials that were measured, by number.
    within_noise : tuple of int
        Numbers of the other trials whose difference from the best is at most
        :data:`neuronrank_core.measures.NOISE` standard errors: the windows do not tell them from the best. Empty for a
        single window.
    given_up : int
        Number of trials that were stopped early or failed.
    failed : dict of str
        Error message of each trial that failed, by number.
    importance : dict of float
        How much each setting contributes to the difference between the best quarter of the trials and the others, as
        fractions; empty if fewer than four trials were measured.
    documented_order : tuple of str
        Settings by importance, according to the documentation of the methods.
    test : HeldOut or None
        Null without ``--test-dataset``.
    notes : tuple of str
        Warnings.
    versions : dict of str
        Version of each package that influences the result.
    schema : int
        Version of this format.
    """

    model: str
    stats: str
    validation: Protocol
    dense: float
    best: Trial
    trials: tuple[Trial, ...]
    within_noise: tuple[int, ...]
    given_up: int
    failed: dict[str, str]
    importance: dict[str, float]
    documented_order: tuple[str, ...]
    test: HeldOut | None
    notes: tuple[str, ...]
    versions: dict[str, str]
    schema: int = 1
