"""Parameters of an estimator by the conventions of scikit-learn, without importing it."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any, TypeVar

import numpy as np

from neuronrank_core.errors import InvalidValueError
from neuronrank_core.methods import METHODS, check_method
from neuronrank_core.recipe import Recipe

_Self = TypeVar("_Self", bound="Parameters")
#: Fields of a recipe that apply without a language model.
_SETTINGS = {"sparsity_type", "compare", "seed"}.union(*(method.reads for method in METHODS.values())) - {
    "signal",
    "tokens_per_document",
}
#: Every parameter with its default.
_DEFAULTS: dict[str, Any] = {"method": "neuronrank_tfidf", "layer": "?"} | {
    f.name: f.default for f in sorted(fields(Recipe), key=lambda f: f.name) if f.name in _SETTINGS
}


class Parameters:
    """Keeps the method, the name of the layer and the settings of a recipe as attributes, unchecked until used.

    Parameters
    ----------
    method, layer, **settings
        See :class:`neuronrank_core.NeuronRank`.
    """

    method: str
    layer: int | str

    def __init__(self, method: str = "neuronrank_tfidf", *, layer: int | str = "?", **settings: Any) -> None:
        self.set_params(**{**_DEFAULTS, "method": method, "layer": layer, **settings})

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Every parameter by name. ``deep`` is for scikit-learn; no parameter is an estimator."""
        del deep
        return {name: getattr(self, name) for name in _DEFAULTS}

    def set_params(self: _Self, **params: Any) -> _Self:
        """Set parameters; they apply from the next ``fit``. Raises InvalidValueError if one is unknown."""
        for name in sorted(params.keys() - _DEFAULTS.keys()):
            raise InvalidValueError("setting", name, "one of " + ", ".join(_DEFAULTS))
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn, which alone calls this, asks of an estimator."""
        utils = import_module("sklearn.utils")
        return utils.Tags(estimator_type=None, target_tags=utils.TargetTags(required=False))

    def __sklearn_is_fitted__(self) -> bool:
        """Whether ``fit`` was called."""
        return "_fitted" in vars(self)

    def __repr__(self) -> str:
        """The parameters that differ from their defaults."""
        given = [f"{name}={value!r}" for name, value in self.get_params().items() if value != _DEFAULTS[name]]
        return f"{type(self).__name__}({', '.join(given)})"

    @property
    def recipe(self) -> Recipe:
        """The parameters as a recipe; raises InvalidValueError if a value is out of range."""
        given = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in self.get_params().items()
            if name != "layer"
        }
        recipe = Recipe(**given)
        if recipe.removes_heads or recipe.removes_experts or recipe.removes_layers:
            raise InvalidValueError("sparsity_type", recipe.sparsity_type, "unstructured, N:M or neurons")
        check_method(recipe)
        return recipe
