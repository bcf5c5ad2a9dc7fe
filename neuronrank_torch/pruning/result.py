"""Result of a run: sparsity per module, time per layer, and everything needed to repeat it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
import torch
import transformers

from neuronrank_core import Recipe, __version__
from neuronrank_core.methods import decided
from neuronrank_torch.model.streaming import HEAD


@dataclass(frozen=True)
class ModuleReport:
    """One pruned weight matrix.

    Parameters
    ----------
    size : int
        Number of weights before pruning.
    zeros : int
        Number of weights that are zero now.
    removed : int
        Number of weights that were removed with their neurons, heads or experts.
    zeros_before : int
        Number of weights that were zero before pruning.
    sparsity : float
        Fraction of ``size`` that was removed; where nothing was removed, that is zero. Computed.
    """

    size: int
    zeros: int
    removed: int = 0
    zeros_before: int = 0
    sparsity: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", (self.removed or self.zeros) / self.size if self.size else 0.0)


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer, or the output head.

    Parameters
    ----------
    layer : int or str
        Number of the layer, from 0, or ``lm_head``.
    modules : dict of ModuleReport
        By name.
    seconds : float
        Wall time of calibration, scoring and propagation; 0 in a dry run.
    notes : tuple of str
        Warnings.
    experts_removed : tuple of int
        Indices of the experts that were removed.
    """

    layer: int | str
    modules: dict[str, ModuleReport]
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    experts_removed: tuple[int, ...] = ()

    def sum(self, what: str) -> int:
        """Sum of a field over the modules."""
        return sum(getattr(module, what) for module in self.modules.values())


@dataclass(frozen=True)
class Total:
    """Sums over the model.

    Parameters
    ----------
    parameters : int
        Parameters of the whole model after pruning.
    prunable : int
        Weights before pruning in all modules that were pruned.
    zeros : int
        Number of those that are zero now.
    removed : int
        Number of those that were removed with their neurons, heads or experts.
    zeros_before : int
        Number of those that were zero before pruning.
    """

    parameters: int
    prunable: int
    zeros: int
    removed: int
    zeros_before: int = 0


@dataclass(frozen=True)
class Calibration:
    """The text that pruning was based on; all zero or null where the method needs no text.

    Parameters
    ----------
    tokens : int
        Number of calibration tokens.
    text_sha256 : str or None
        SHA-256 of the text; null in a dry run without statistics.
    dataset : str or None
        Source of the text behind statistics; null where the text was read from ``job.dataset``.
    statistics : str or None
        Folder of statistics, if pruning was based on one.
    """

    tokens: int = 0
    text_sha256: str | None = None
    dataset: str | None = None
    statistics: str | None = None


@dataclass(frozen=True)
class Report:
    """What :func:`neuronrank_torch.prune` did to a model.

    Parameters
    ----------
    recipe : Recipe
        With the defaults of the method filled in.
    layers : tuple of LayerReport
        The layers that were pruned, and the head.
    total : Total
    calibration : Calibration
    seconds : float
        Wall time of pruning.
    notes : tuple of str
        Warnings.
    versions : dict of str
        Version of each package that influences the result.
    """

    recipe: Recipe
    layers: tuple[LayerReport, ...]
    total: Total
    calibration: Calibration
    seconds: float
    notes: tuple[str, ...]
    versions: dict[str, str]

    def __repr__(self) -> str:
        """One line; the fields hold the rest."""
        return f"{type(self).__name__}({self._summary()})"

    def _repr_html_(self) -> str:
        """For notebooks: the line, the notes, and a table by layer that can be opened."""
        gone = self._gone
        rows = [
            (str(layer.layer), f"{size:,}", f"{lost:,}", f"{lost / size if size else 0.0:.2%}", f"{layer.seconds:.1f}")
            for layer in self.layers
            for size, lost in [(layer.sum("size"), layer.sum(gone))]
        ]
        head, *body = (
            f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
            for tag, cells in [("th", ("layer", "weights", gone, "share", "seconds")), *(("td", row) for row in rows)]
        )
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        listed = f"<ul>{notes}</ul>" if notes else ""
        return (
            f"<p>{escape(self._summary())}</p>{listed}<details><summary>by layer</summary>"
            f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table></details>"
        )

    @property
    def _gone(self) -> str:
        return "removed" if self.total.removed else "zeros"

    def _summary(self) -> str:
        """What was pruned, of how much, and how long it took."""
        recipe, total = self.recipe, self.total
        lost, verb = getattr(total, self._gone), "removed" if total.removed else "zero"
        share = f"{lost / total.prunable:.2%}" if total.prunable else "none"
        names = [one.layer for one in self.layers]
        where = " and ".join([f"{sum(n != HEAD for n in names)} layers", *(HEAD for n in names if n == HEAD)])
        goal = f"{recipe.method}, {recipe.ratio:.4g} {recipe.sparsity_type}"
        return f"{goal}: {lost:,} of {total.prunable:,} weights {verb} ({share}) in {where}, {self.seconds:.1f} s"

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        layers: Sequence[LayerReport],
        parameters: int,
        calibration: Calibration,
        seconds: float = 0.0,
        notes: Iterable[str] = (),
    ) -> Report:
        """The report of a run that pruned these layers, with their sums; ``parameters`` are the model's now."""
        sums = (sum(layer.sum(what) for layer in layers) for what in ("size", "zeros", "removed", "zeros_before"))
        total = Total(parameters, *sums)
        return cls(decided(recipe), tuple(layers), total, calibration, seconds, tuple(notes), versions())


def versions() -> dict[str, str]:
    """Versions of the software that results depend on."""
    return {
        "neuronrank": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
