"""Base class of the pruning methods."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import ClassVar

import numpy as np

from neuronrank_core.errors import InputError
from neuronrank_core.kernels import Array, Vector
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.recipe import Exponents, Recipe
from neuronrank_core.statistics.neurons import NeuronStatistics
from neuronrank_core.statistics.table import EXPERTS, SAMPLE, SIGNAL


class Method(ABC):
    """A way to score the weights of a layer; the lowest scores are pruned."""

    #: Name on the command line.
    name: ClassVar[str]
    #: One line for the command-line help and the docs.
    summary: ClassVar[str]
    #: Exponents that differ from :class:`neuronrank_core.recipe.Exponents`.
    defaults: ClassVar[Mapping[str, float]] = {}
    #: Fields of the recipe that this method reads in addition to the common ones; the others have no effect.
    reads: ClassVar[frozenset[str]] = frozenset()
    #: How groups are formed, if the method fixes it.
    mode: ClassVar[str | None] = None
    #: The same for experts: exponents that differ from :attr:`defaults`, and how groups are formed.
    expert_defaults: ClassVar[Mapping[str, float]] = {}
    expert_mode: ClassVar[str | None] = None
    #: Method that scores modules outside the MLP (attention, head).
    beyond_mlp: ClassVar[str] = "wanda"
    #: Whether the score of an expert reads the TF of the recipe's signal.
    expert_signal: ClassVar[bool] = False

    @abstractmethod
    def score(self, module: str, context: ScoringContext) -> Array:
        """Score every weight of a module, shape (out_features, in_features); the array returned may be overwritten."""

    @abstractmethod
    def requires(self, recipe: Recipe) -> frozenset[str]:
        """Kinds of statistics that the recipe needs: INPUTS, SIGNAL, SAMPLE; empty means no calibration."""

    def neuron_score(self, context: ScoringContext) -> Vector:
        """Score every neuron as a whole, shape (neurons,).

        Raises
        ------
        InputError
            If the method has no score for whole neurons.
        """
        del context
        raise InputError(f"{self.name} has no score for whole neurons", hint="use --prune_method neuronrank_wanda")

    def head_score(self, context: ScoringContext) -> Vector:
        """Score every attention head as a whole, shape (heads,); the score of several heads is their sum.

        Raises
        ------
        InputError
            If the method has no score for heads.
        """
        del context
        raise InputError(f"{self.name} has no score for heads", hint="use --prune_method neuronrank_wanda")

    def head_requires(self, recipe: Recipe) -> frozenset[str]:
        """Kinds of statistics that :meth:`head_score` needs; what :meth:`requires` returns by default."""
        return self.requires(recipe)

    def expert_score(self, context: ScoringContext) -> Vector:
        """Score every expert of a mixture as a whole, shape (experts,).

        Raises
        ------
        InputError
            If the method has no score for experts.
        """
        del context
        raise InputError(f"{self.name} has no score for experts", hint="use --prune_method neuronrank_tfidf")

    def expert_requires(self, recipe: Recipe) -> frozenset[str]:
        """Kinds of statistics that :meth:`expert_score` needs: the sums of each expert, for topics a sample too."""
        e = self.exponents(recipe)
        topics = self.mode_in(recipe) == "topic" and (e.idf_exp or e.tf_exp)
        return frozenset({EXPERTS} | ({SAMPLE} if topics else set()))

    @property
    def ranks_experts(self) -> bool:
        """Whether the method implements :meth:`expert_score`."""
        return type(self).expert_score is not Method.expert_score

    @property
    def ranks_heads(self) -> bool:
        """Whether the method implements :meth:`head_score`."""
        return type(self).head_score is not Method.head_score

    @property
    def ranks_weights(self) -> bool:
        """Whether the method scores single weights."""
        return not isinstance(self, ExpertMethod)

    @property
    def ranks_neurons(self) -> bool:
        """Whether the method implements :meth:`neuron_score`."""
        return type(self).neuron_score is not Method.neuron_score

    def compare(self, module: str) -> str:
        """Default comparison group: ``module``, ``row`` or ``column``."""
        del module
        return "module"

    def mode_in(self, recipe: Recipe) -> str:
        """How groups are formed: as the method fixes it, otherwise by the recipe's ``tfidf_mode``."""
        return (recipe.removes_experts and self.expert_mode) or self.mode or recipe.tfidf_mode

    def exponents(self, recipe: Recipe) -> Exponents:
        """The recipe's exponents, completed with :attr:`defaults` and for experts :attr:`expert_defaults`."""
        chosen = {**asdict(Exponents()), **self.defaults, **(self.expert_defaults if recipe.removes_experts else {})}
        given = {name: getattr(recipe, name) for name in chosen}
        return Exponents(**{name: chosen[name] if value is None else value for name, value in given.items()})

    def neurons(self, context: ScoringContext) -> NeuronStatistics:
        """TF, DF, IDF and spikiness of the layer's neurons, each computed on first access."""
        return context.neurons(self.mode_in(context.recipe))

    def importance(self, context: ScoringContext, strength: Vector | None = None) -> Vector:
        """``strength^tf_exp * idf^idf_exp * spikiness^spikiness_exp`` of each neuron, head or expert, shape (terms,).

        Terms with exponent 0 are not computed, so they need no statistics.

        Parameters
        ----------
        context : ScoringContext
        strength : float64 array, shape (neurons,), optional
            How strongly each neuron fires; its TF by default.
        """
        e = self.exponents(context.recipe)
        factor = np.ones(context.terms)
        if e.tf_exp:
            factor = (self.neurons(context).tf if strength is None else strength) ** e.tf_exp
        if e.idf_exp:
            factor = factor * self.neurons(context).idf ** e.idf_exp
        if e.spikiness_exp:
            factor = factor * self.neurons(context).spikiness ** e.spikiness_exp
        return factor

    def tfidf_requires(self, recipe: Recipe, *, tf_from_signal: bool = True) -> frozenset[str]:
        """Statistics that :meth:`importance` needs with the recipe's exponents.

        Parameters
        ----------
        recipe : Recipe
        tf_from_signal : bool
            Whether the strength is the TF of the signal.
        """
        e, mode = self.exponents(recipe), self.mode_in(recipe)
        needs = set()
        if (tf_from_signal and e.tf_exp) or e.spikiness_exp or (e.idf_exp and mode == "token"):
            needs.add(SIGNAL)
        if (e.idf_exp and mode != "token") or (tf_from_signal and e.tf_exp and mode == "topic"):
            needs.add(SAMPLE)
        return frozenset(needs)


class ExpertMethod(Method):
    """A way to score the experts of a mixture that has none for weights, neurons or heads."""

    mode = "doc"  # It reads sums alone.

    def score(self, module: str, context: ScoringContext) -> Array:
        """Raise InputError."""
        del module, context
        raise InputError(f"{self.name} scores whole experts only", hint="use --sparsity_type experts")

    def requires(self, recipe: Recipe) -> frozenset[str]:
        """What the score of experts needs."""
        return self.expert_requires(recipe)
