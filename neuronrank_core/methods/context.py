"""What a method may look at when it scores one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from neuronrank_core.errors import MissingStatisticsError
from neuronrank_core.kernels import Array, Kernels, Vector
from neuronrank_core.statistics import tfidf
from neuronrank_core.statistics.neurons import NeuronStatistics
from neuronrank_core.statistics.numpy_kernels import NumpyKernels
from neuronrank_core.statistics.table import SHARED_INPUT, LayerStatistics

if TYPE_CHECKING:
    from neuronrank_core.recipe import Exponents, Recipe


@dataclass(frozen=True)
class ScoringContext:
    """One layer: its statistics, its dense weights and the recipe.

    Parameters
    ----------
    layer : int or str
        Named in errors.
    recipe : Recipe
    weights : dict of arrays, shape (out_features, in_features)
        Dense weights by module name (``gate_proj``, ...), NumPy or torch, in the precision to score in.
    statistics : LayerStatistics, optional
        None for methods that look at the weights alone.
    kernels : Kernels
        Backend of the work over tokens and weights.
    ratio : float, optional
        Share of the MLP's weights to zero in this layer; the recipe's by default.
    known : NeuronStatistics, optional
        TF, DF, IDF and spikiness where they are there already; by default worked out from the statistics.
    """

    layer: int | str
    recipe: Recipe
    weights: Mapping[str, Array]
    statistics: LayerStatistics | None = None
    kernels: Kernels = field(default_factory=NumpyKernels)
    ratio: float | None = None
    known: NeuronStatistics | None = None

    def at(self, module: str, weight: Array) -> ScoringContext:
        """The same layer with another weight in a module; what neurons are worth is not worked out anew."""
        known = self.neurons if self.statistics is not None else None
        return replace(self, weights={**self.weights, module: weight}, known=known)

    @cached_property
    def exponents(self) -> Exponents:
        """The recipe's exponents, completed with its method's defaults."""
        return self.recipe.exponents

    @property
    def table(self) -> LayerStatistics:
        """The statistics; raises MissingStatisticsError where there are none."""
        if self.statistics is None:
            raise MissingStatisticsError(self.layer)
        return self.statistics

    @cached_property
    def neurons(self) -> NeuronStatistics:
        """TF, DF, IDF and spikiness in the recipe's mode."""
        return self.known or NeuronStatistics(self.table, self.recipe, self.kernels, self.layer)

    def input_rms(self, module: str) -> Vector:
        """Root mean square of the module's input features, shape (in_features,)."""
        mean_square = self.table.require(f"input_mean_square.{SHARED_INPUT.get(module, module)}", self.layer)
        return tfidf.root_mean_square(mean_square, self.table.tokens)

    def input_norm(self, module: str) -> Array:
        """:meth:`input_rms` in the library of the module's weight."""
        return self.kernels.asarray(self.input_rms(module), self.weights[module])

    def importance(self, strength: Vector | None = None) -> Vector:
        """``strength^tf_exp * idf^idf_exp * spikiness^spikiness_exp``, shape (neurons,).

        Terms with exponent 0 are not worked out, so they need no statistics.

        Parameters
        ----------
        strength : float64 array, shape (neurons,), optional
            How strongly each neuron fires; its TF by default.
        """
        e = self.exponents
        factor = np.ones(len(self.weights["gate_proj"]))
        if e.tf_exp:
            factor = (self.neurons.tf if strength is None else strength) ** e.tf_exp
        if e.idf_exp:
            factor = factor * self.neurons.idf**e.idf_exp
        if e.spikiness_exp:
            factor = factor * self.neurons.spikiness**e.spikiness_exp
        return factor
