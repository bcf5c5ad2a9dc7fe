"""Result of a run: sparsity per module, time per layer, and everything needed to repeat it."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from neuronrank_core import Recipe, __version__
from neuronrank_core.methods import exponents


@dataclass(frozen=True)
class ModuleReport:
    """One weight matrix after pruning: original size, zeros, and weights removed with their neurons."""

    name: str
    size: int
    zeros: int
    removed: int = 0

    @property
    def sparsity(self) -> float:
        """Share of weights that are zero or removed."""
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
    """Result of :func:`neuronrank_torch.prune`.

    Parameters
    ----------
    recipe : Recipe
        As requested.
    layers : tuple of LayerReport
        The pruned layers.
    parameters : int
        Parameters of the whole model after pruning.
    calibration : dict
        Text fingerprint, tokens and sequences used; empty if no text was needed.
    seconds : float
        Wall time of the whole run.
    notes : tuple of str
        Notes for the user, such as a ``pruning_last`` larger than the number of layers.
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

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            "recipe": recipe_values(self.recipe),
            "layers": [
                {
                    "layer": layer.layer,
                    "seconds": round(layer.seconds, 3),
                    "modules": {
                        m.name: {"size": m.size, "zeros": m.zeros, "removed": m.removed, "sparsity": m.sparsity}
                        for m in layer.modules
                    },
                }
                for layer in self.layers
            ],
            "total": {
                "parameters": self.parameters,
                "prunable": self.size,
                "zeros": self.zeros,
                "removed": self.removed,
            },
            "calibration": self.calibration,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
            "versions": versions(),
        }


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe, resolved with its method's defaults."""
    return {**asdict(recipe), "sparsity_ratio": recipe.ratio, **asdict(exponents(recipe))}


def versions() -> dict[str, str]:
    """Versions of the software that results depend on."""
    return {
        "neuronrank": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
