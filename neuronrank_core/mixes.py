"""What to remove from a model so that it reaches a target size: mixes of neurons, attention heads and layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, lcm

from neuronrank_core.errors import InvalidValueError
from neuronrank_core.recipe import Recipe
from neuronrank_core.selection.patterns import exact_ratio
from neuronrank_core.validation import number, validate

#: A result has at most this share of the parameters less than the target.
SLACK = 0.02
#: Where nothing else is asked for, the width of the MLPs stays a multiple of at most this power of two.
MULTIPLE = 64
#: Shares of the parameters that a bound on the loss is tried with, and the one at which the mixes are compared.
SHARES = tuple(share / 100 for share in range(30, 100, 5))
COMPARED_AT = 0.8
#: Calibration sequences with which candidates are measured: this part of those of the run, and at least so many.
REHEARSED, FEWEST = 0.25, 8
#: What is counted by each sparsity type.
NOUNS = {
    "layers-by-influence": "layers",
    "query-heads": "query heads of each group",
    "key-value-groups": "key-value groups",
    "neurons": "neurons of each layer",
}
#: A mix: by sparsity type, in the order of removal, how many go and of how many.
Mix = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Target:
    """How small a model has to become: exactly one of both.

    Parameters
    ----------
    target_params : float, optional
        Largest share that may stay of the parameters outside input and output embeddings.
    max_loss : float, optional
        Largest relative rise of the perplexity on held-out calibration text.

    Raises
    ------
    InvalidValueError
        If a value is out of range.
    """

    target_params: float | None = number(None, 0, 1, open_ends=True)
    max_loss: float | None = number(None, 0)

    def __post_init__(self) -> None:
        validate(self)
        if (self.target_params is None) == (self.max_loss is None):
            raise InvalidValueError("max_loss", self.max_loss, "a number, if and only if target_params is not set")

    @property
    def flag(self) -> str:
        """The flag that asks for it."""
        return "--max-loss" if self.target_params is None else "--target-params"


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters.

    Parameters
    ----------
    parameters : int
        All outside input and output embeddings.
    layers : int
    layer : int
        Parameters of one layer; 0 if layers cannot be removed.
    neurons, neuron : int
        Neurons of a layer, and parameters of one; 0 if neurons cannot be removed.
    heads : dict of (int, int, int)
        By sparsity type, the fewest heads or groups that can be removed, of how many, and their parameters in a layer.
    aligned : int
        What divides the numbers of neurons with which the model can run.
    """

    parameters: int
    layers: int
    layer: int = 0
    neurons: int = 0
    neuron: int = 0
    heads: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    aligned: int = 1


def width_multiple(sizes: Sizes, recipe: Recipe) -> int:
    """What has to divide the width of the MLPs: ``multiple_of`` of the recipe, or a power of two.

    It is the largest power of two up to :data:`MULTIPLE` that divides the dense width and of which one step is not more
    than :data:`SLACK` of the parameters. In both cases, :attr:`Sizes.aligned` divides it too.
    """
    if recipe.multiple_of is not None:
        return lcm(recipe.multiple_of, sizes.aligned)
    multiple, step = MULTIPLE, sizes.layers * sizes.neuron
    while multiple > 1 and (sizes.neurons % multiple or multiple * step > SLACK * sizes.parameters):
        multiple //= 2
    return lcm(multiple, sizes.aligned)


def mixes(sizes: Sizes, share: float, recipe: Recipe) -> dict[str, Mix]:
    """The mixes that reach a target size, by a name that does not depend on it.

    Neurons alone; the fewest heads or groups, then neurons; as many layers as possible, or half as many, then neurons.

    Parameters
    ----------
    sizes : Sizes
    share : float
        Share of the parameters that may stay; a result has at most :data:`SLACK` less.
    recipe : Recipe
        Its ``multiple_of`` is that of the width.
    """
    fit = int((1 - share + SLACK) * sizes.parameters / sizes.layer) if sizes.layer else 0
    fit = min(fit, sizes.layers - 1)
    found = {"neurons": _mix(sizes, share, recipe, 0, "")}
    found |= {f"{way}, neurons": _mix(sizes, share, recipe, 0, way) for way in sizes.heads}
    found |= {"layers, neurons": _mix(sizes, share, recipe, fit, "")} if fit else {}
    found |= {"neurons, layers": _mix(sizes, share, recipe, fit // 2, "")} if fit > 1 else {}
    return {name: mix for name, mix in found.items() if mix}


def left(sizes: Sizes, mix: Mix) -> int:
    """The number of parameters that stay, outside the embeddings."""
    layers, neurons = (mix.get(kind, (0, 0))[0] for kind in ("layers-by-influence", "neurons"))
    heads = sum(size for way, (_, _, size) in sizes.heads.items() if way in mix)
    return sizes.parameters - layers * sizes.layer - (sizes.layers - layers) * (heads + neurons * sizes.neuron)


def _mix(sizes: Sizes, share: float, recipe: Recipe, layers: int, way: str) -> Mix | None:
    """So many layers, the fewest heads of this way, and as many neurons as are needed; None if it misses the target."""
    mix = {"layers-by-influence": (layers, sizes.layers)} if layers else {}
    mix |= {way: sizes.heads[way][:2]} if way else {}
    over = left(sizes, mix) - share * sizes.parameters
    if over > 0:
        if not sizes.neurons:
            return None
        multiple = width_multiple(sizes, recipe)
        gone = ceil(over / ((sizes.layers - layers) * sizes.neuron))
        width = (sizes.neurons - gone) // multiple * multiple
        if width <= 0:
            return None
        mix["neurons"] = sizes.neurons - width, sizes.neurons
    return mix if left(sizes, mix) >= (share - SLACK) * sizes.parameters else None


def passes(mix: Mix, recipe: Recipe) -> list[Recipe]:
    """The recipes that remove a mix, one after another."""
    own = {kind: exact_ratio(*number) for kind, number in mix.items()}
    return [replace(recipe, sparsity_type=kind, sparsity_ratio=ratio, multiple_of=None) for kind, ratio in own.items()]


def described(mix: Mix) -> str:
    """A mix in words."""
    return " + ".join(f"{goes} of {of} {NOUNS[kind]}" for kind, (goes, of) in mix.items())


def rehearsed(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes with as many sequences as candidates are measured with."""
    return [
        replace(recipe, nsamples=min(recipe.nsamples, max(FEWEST, ceil(REHEARSED * recipe.nsamples))))
        for recipe in recipes
    ]
