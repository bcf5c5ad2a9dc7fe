"""The data that a method scores one layer by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from neuronrank_core.errors import MissingStatisticsError
from neuronrank_core.kernels import Array, Kernels, Vector
from neuronrank_core.methods.scoring import NEURON_AXIS
from neuronrank_core.recipe import Recipe
from neuronrank_core.statistics import tfidf
from neuronrank_core.statistics.experts import ExpertStatistics
from neuronrank_core.statistics.neurons import NeuronStatistics
from neuronrank_core.statistics.numpy_kernels import NumpyKernels
from neuronrank_core.statistics.table import SHARED_INPUT, LayerStatistics


@dataclass(frozen=True)
class ScoringContext:
    """One layer: its statistics, its dense weights and the recipe.

    Parameters
    ----------
    layer : int or str
        Used in error messages.
    recipe : Recipe
    weights : dict of arrays, shape (out_features, in_features)
        Dense weights by module name (``gate_proj``, ...), NumPy or torch, in the precision of the scores.
    statistics : LayerStatistics, optional
        None for methods that use only the weights.
    kernels : Kernels
        Backend for operations over tokens and weights.
    ratio : float, optional
        Share of the MLP's weights to zero in this layer; the recipe's by default.
    known : dict of NeuronStatistics, optional
        Precomputed TF, DF, IDF and spikiness by mode; by default computed from the statistics.
    heads : int, optional
        Number of heads, if the layer's attention is scored: the columns of the statistics are then its heads.
    experts : int, optional
        Number of experts, if those of a mixture are scored: the columns of the statistics are then its experts.
    norms : dict of arrays, shape (in_features,), optional
        By module, what :meth:`input_norm` returns instead of the inputs' root mean square.
    """

    layer: int | str
    recipe: Recipe
    weights: Mapping[str, Array]
    statistics: LayerStatistics | None = None
    kernels: Kernels = field(default_factory=NumpyKernels)
    ratio: float | None = None
    known: dict[str, NeuronStatistics] | None = None
    heads: int | None = None
    experts: int | None = None
    norms: Mapping[str, Array] = field(default_factory=dict)

    def at(self, module: str, weight: Array, input_norm: Array | None = None) -> ScoringContext:
        """The same layer with another weight, or input norm, in a module; computed neuron statistics are reused."""
        norms = self.norms if input_norm is None else {**self.norms, module: input_norm}
        return replace(self, weights={**self.weights, module: weight}, known=self._neurons, norms=norms)

    @property
    def table(self) -> LayerStatistics:
        """The statistics; raises MissingStatisticsError if there are none."""
        if self.statistics is None:
            raise MissingStatisticsError(self.layer)
        return self.statistics

    def neurons(self, mode: str) -> NeuronStatistics:
        """TF, DF, IDF and spikiness with groups formed by ``mode``; cached."""
        if mode not in self._neurons:
            kind = NeuronStatistics if self.experts is None else ExpertStatistics
            self._neurons[mode] = kind(self.table, self.recipe, self.kernels, self.layer, mode=mode)
        return self._neurons[mode]

    def expert_statistics(self, mode: str = "doc") -> ExpertStatistics:
        """Those of the experts of a mixture."""
        found = self.neurons(mode)
        assert isinstance(found, ExpertStatistics)
        return found

    @cached_property
    def _neurons(self) -> dict[str, NeuronStatistics]:
        return {} if self.known is None else self.known

    @property
    def terms(self) -> int:
        """Number of heads, experts or neurons, whichever are scored."""
        if self.heads or self.experts:
            return self.heads or self.experts or 0
        module, weight = next(iter(self.weights.items()))  # All have as many neurons.
        return int(weight.shape[NEURON_AXIS[module]])

    def contribution(self) -> Vector:
        """Mean square, over all tokens, of the norm of what each head adds; shape (heads,)."""
        return tfidf.over_documents(self.table.require("signal_mean_square", self.layer), self.table.tokens)

    def input_rms(self, module: str) -> Vector:
        """Root mean square of the module's input features, shape (in_features,)."""
        mean_square = self.table.require(f"input_mean_square.{SHARED_INPUT.get(module, module)}", self.layer)
        return tfidf.root_mean_square(mean_square, self.table.tokens)

    def input_norm(self, module: str) -> Array:
        """Norm of the module's input features, of the same library as its weight, shape (in_features,).

        Up to a constant factor. By default :meth:`input_rms`.
        """
        if module in self.norms:
            return self.norms[module]
        return self.kernels.asarray(self.input_rms(module), self.weights[module])
