"""Select the layers to remove."""

from math import ceil

from neuronrank_core.errors import InvalidValueError
from neuronrank_core.recipe import Recipe


def removed_layers(layers: int, recipe: Recipe) -> int:
    """The number of layers that go, ``int(ratio * layers)``; raises InvalidValueError if that is none."""
    goes = int(recipe.ratio * layers)
    if goes == 0:
        allowed = f"at least {ceil(1e4 / layers) / 1e4:g} and below 1" if layers > 1 else "none"
        raise InvalidValueError("sparsity_ratio", recipe.ratio, f"{allowed}, to remove one of {layers} layers")
    return goes
