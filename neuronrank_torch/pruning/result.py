"""What a run did: sparsity reached per module, time per layer, and everything needed to repeat it."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import transformers

from neuronrank_core import Recipe, __version__
from neuronrank_core.methods import exponents
from neuronrank_torch.schema import to_json


@dataclass(frozen=True)
class ModuleFigures:
    """One pruned weight matrix.

    Parameters
    ----------
    size : int
        Number of weights before pruning.
    zeros : int
        Number of weights that are zero now.
    removed : int
        Number of weights that were removed with their neurons.
    sparsity : float
        Fraction of ``size`` that is zero or removed; computed.
    """

    size: int
    zeros: int
    removed: int = 0
    sparsity: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", (self.zeros + self.removed) / self.size if self.size else 0.0)


@dataclass(frozen=True)
class LayerFigures:
    """One decoder layer, or the output head.

    Parameters
    ----------
    layer : int or str
        Number of the layer, from 0, or ``lm_head``.
    seconds : float
        Wall time of calibration, scoring and propagation; 0 in a dry run.
    modules : dict of ModuleFigures
        By name.
    """

    layer: int | str
    seconds: float
    modules: dict[str, ModuleFigures]


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
        Number of those that were removed with their neurons.
    """

    parameters: int
    prunable: int
    zeros: int
    removed: int


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
class PruneFigures:
    """What pruning did to a model.

    Parameters
    ----------
    recipe : Recipe
        With the defaults of the method filled in.
    layers : tuple of LayerFigures
        The layers that were pruned.
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
    layers: tuple[LayerFigures, ...]
    total: Total
    calibration: Calibration
    seconds: float
    notes: tuple[str, ...]
    versions: dict[str, str]


@dataclass(frozen=True)
class ModuleReport:
    """One weight matrix after pruning: weights it had, zeros it has, weights removed with their neurons."""

    name: str
    size: int
    zeros: int
    removed: int = 0

    @property
    def sparsity(self) -> float:
        """Share of weights that are zero or gone."""
        return (self.zeros + self.removed) / self.size


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer (or the head) after pruning; seconds cover calibration, scoring and propagation."""

    layer: int | str
    modules: tuple[ModuleReport, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LayerReport:
        """The inverse of ``dataclasses.asdict``."""
        modules = tuple(ModuleReport(**module) for module in content["modules"])
        return cls(**{**content, "modules": modules, "notes": tuple(content["notes"])})

    @property
    def size(self) -> int:
        """Weights in the prunable modules."""
        return sum(module.size for module in self.modules)

    @property
    def zeros(self) -> int:
        """Zero weights in the prunable modules."""
        return sum(module.zeros for module in self.modules)


@dataclass(frozen=True)
class Report:
    """What :func:`neuronrank_torch.prune` did.

    Parameters
    ----------
    recipe : Recipe
        As asked for.
    layers : tuple of LayerReport
        Those that were pruned.
    parameters : int
        Parameters of the whole model as it is now.
    calibration : dict
        Text fingerprint, tokens and sequences used; empty where no text was needed.
    seconds : float
        Wall time of the whole run.
    notes : tuple of str
        What the user should know, such as a ``pruning_last`` beyond the model's layers.
    """

    recipe: Recipe
    layers: tuple[LayerReport, ...]
    parameters: int
    calibration: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Weights in all pruned modules."""
        return sum(layer.size for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Zero weights in all pruned modules."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def removed(self) -> int:
        """Weights removed with their neurons."""
        return sum(module.removed for layer in self.layers for module in layer.modules)

    def figures(self) -> PruneFigures:
        """The report in the form of ``neuronrank.json``."""
        return PruneFigures(
            recipe=decided(self.recipe),
            layers=tuple(
                LayerFigures(
                    layer.layer,
                    round(layer.seconds, 3),
                    {m.name: ModuleFigures(m.size, m.zeros, m.removed) for m in layer.modules},
                )
                for layer in self.layers
            ),
            total=Total(self.parameters, self.size, self.zeros, self.removed),
            calibration=Calibration(**self.calibration),
            seconds=round(self.seconds, 3),
            notes=self.notes,
            versions=versions(),
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON types."""
        plain: dict[str, Any] = to_json(self.figures())
        return plain


def decided(recipe: Recipe) -> Recipe:
    """The recipe with the defaults of its method filled in."""
    return replace(recipe, sparsity_ratio=recipe.ratio, **asdict(exponents(recipe)))


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The fields of :func:`decided`."""
    return asdict(decided(recipe))


def versions() -> dict[str, str]:
    """Versions of everything that a figure depends on."""
    return {
        "neuronrank": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
