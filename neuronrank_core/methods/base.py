"""What a method declares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from neuronrank_core.errors import InputError

if TYPE_CHECKING:
    from neuronrank_core.kernels import Array, Vector
    from neuronrank_core.methods.context import ScoringContext
    from neuronrank_core.recipe import Recipe
from neuronrank_core.statistics.table import SAMPLE, SIGNAL


class Method(ABC):
    """A way to score the weights of a layer; the lowest scores go."""

    #: Name on the command line.
    name: ClassVar[str]
    #: One line for the help and the docs.
    summary: ClassVar[str]
    #: Exponents that differ from :class:`neuronrank_core.recipe.Exponents`.
    defaults: ClassVar[Mapping[str, float]] = {}
    #: Fields of the recipe that this method reads beyond those every method does; the others have no effect.
    reads: ClassVar[frozenset[str]] = frozenset()
    #: How groups are formed, where the method leaves no choice.
    mode: ClassVar[str | None] = None
    #: Method that scores modules without neurons (attention, head).
    beyond_mlp: ClassVar[str] = "wanda"

    @abstractmethod
    def score(self, module: str, context: ScoringContext) -> Array:
        """Score every weight of a module, shape (out_features, in_features)."""

    @abstractmethod
    def requires(self, recipe: Recipe) -> frozenset[str]:
        """Kinds of statistics that the recipe needs: of INPUTS, SIGNAL, SAMPLE; none means no calibration."""

    def neuron_score(self, context: ScoringContext) -> Vector:
        """Score every neuron as a whole, shape (neurons,).

        Raises
        ------
        InputError
            If the method does not tell neurons apart.
        """
        del context
        raise InputError(f"{self.name} has no score for whole neurons", hint="use --prune_method neuronrank_wanda")

    @property
    def ranks_neurons(self) -> bool:
        """Whether :meth:`neuron_score` is there."""
        return type(self).neuron_score is not Method.neuron_score

    def compare(self, module: str) -> str:
        """Comparison group by default: ``module`` or ``row``."""
        del module
        return "module"


def tfidf_requires(recipe: Recipe, *, tf_from_signal: bool = True) -> frozenset[str]:
    """Statistics behind ``tf^tf_exp * idf^idf_exp * spikiness^spikiness_exp``, no more than the exponents ask for."""
    e, mode = recipe.exponents, recipe.mode
    needs = set()
    if (tf_from_signal and e.tf_exp) or e.spikiness_exp or (e.idf_exp and mode == "token"):
        needs.add(SIGNAL)
    if (e.idf_exp and mode != "token") or (tf_from_signal and e.tf_exp and mode == "topic"):
        needs.add(SAMPLE)
    return frozenset(needs)
