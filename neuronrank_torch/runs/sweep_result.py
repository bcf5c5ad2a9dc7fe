"""The result of ``neuronrank sweep``, and the file that keeps its cells."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuronrank_core import InputError
from neuronrank_torch.evaluation.perplexity import Perplexity
from neuronrank_torch.files.durable import write_durably
from neuronrank_torch.files.journal import differences

#: Name of the calibration text in what a cell depends on; null where none of the methods reads it.
TEXT = "calibration text"


@dataclass(frozen=True)
class Cell:
    """One combination that was measured.

    Parameters
    ----------
    method : str
        Scoring method.
    update : str
        Update of the remaining weights.
    ratio : float
        Fraction that was asked for.
    share : float or None
        Fraction of the prunable weights that is zero or removed; null if pruning failed.
    perplexity, standard_error : float or None
        On the evaluation text, as in :class:`~neuronrank_torch.evaluation.perplexity.Perplexity`; null if it failed.
    seconds : float
        Wall time of pruning.
    failed : str or None
        Error message.
    """

    method: str
    update: str
    ratio: float
    share: float | None
    perplexity: float | None
    standard_error: float | None
    seconds: float
    failed: str | None = None

    @property
    def key(self) -> tuple[str, str, float]:
        """What tells it from the others of its sweep."""
        return self.method, self.update, self.ratio


@dataclass(frozen=True)
class SweepResult:
    """Result of ``neuronrank sweep``.

    Parameters
    ----------
    model : str
        The model, as it was named.
    out : str
        The file of the cells.
    sparsity_type : str
        As ``--sparsity_type`` takes it.
    evaluated_on : str
        The evaluation text, as it was named.
    dense : Perplexity
        Of the unpruned model.
    cells : tuple of Cell
        By method, update and ratio.
    notes : tuple of str
        Warnings.
    versions : dict of str
        Version of each package that influences the result.
    schema : int
        Version of this format.
    """

    model: str
    out: str
    sparsity_type: str
    evaluated_on: str
    dense: Perplexity
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    schema: int = 1


class CellFile:
    """The cells of a sweep on disk, each with what all of them depend on; rewritten as a whole for every cell."""

    def __init__(self, file: Path, setup: dict[str, Any], *, force: bool) -> None:
        self.file, self.setup = file, json.loads(json.dumps(setup))
        #: What was measured, each with what it depends on.
        self.stored: list[tuple[dict[str, Any], dict[str, Any]]] = []
        try:
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            stored = [(line.pop("setup"), line) for line in map(json.loads, lines)]
            for _, line in stored:
                Perplexity(**line["dense"]) if "dense" in line else Cell(**line)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{file} is not a file of cells", hint="choose another --out") from error
        changes = next(filter(None, (self._changes(setup) for setup, _ in stored)), [])
        if changes and not force:
            raise InputError(
                f"{file} contains a different sweep: {'; '.join(changes[:3])}",
                hint="rerun its command to resume it, choose another --out, or discard it with --force",
            )
        if not changes:
            self.stored = stored

    def _changes(self, setup: dict[str, Any]) -> list[str]:
        """How a cell's setup differs. Cells of methods that read no calibration text go with those of any."""
        without = {name: value for name, value in setup.items() if name != TEXT}
        either = setup.get(TEXT) is None or self.setup[TEXT] is None
        return differences({**without, TEXT: self.setup[TEXT]} if either else setup, self.setup)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What was measured."""
        return [line for _, line in self.stored]

    def abandon(self) -> None:
        """Delete the file if it holds no cell, only the perplexity of the unpruned model."""
        if all("dense" in line for line in self.lines):
            self.file.unlink(missing_ok=True)

    def add(self, line: dict[str, Any]) -> None:
        """Keep one more."""
        self.stored.append((self.setup, line))
        text = "".join(json.dumps({**one, "setup": setup}) + "\n" for setup, one in self.stored)
        write_durably(self.file, lambda path: path.write_text(text, encoding="utf-8"))
