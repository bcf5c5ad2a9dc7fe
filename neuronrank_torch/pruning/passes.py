"""Several structured removals from a model in memory, one after another, and what can be removed from it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from math import lcm
from typing import Any

from neuronrank_core import InputError, Recipe
from neuronrank_core.mixes import Sizes
from neuronrank_core.recipe import HEADS
from neuronrank_core.selection.heads import head_steps
from neuronrank_core.selection.layers import removed_layers
from neuronrank_core.selection.patterns import exact_ratio
from neuronrank_torch.model.structure import Decoder, find_decoder
from neuronrank_torch.pruning.prune import prune
from neuronrank_torch.pruning.result import WHOLE, LayerReport, Report
from neuronrank_torch.pruning.scope import planned_layers
from neuronrank_torch.pruning.sparsity_types import sparsity_type_of
from neuronrank_torch.pruning.sparsity_types.neurons import aligned
from neuronrank_torch.pruning.whole_layers import whole_layer


def prune_in_passes(model: Any, tokenizer: Any, recipes: Sequence[Recipe], texts: str, **how: Any) -> Report:
    """Prune a model in place by each recipe in turn; options as of :func:`neuronrank_torch.prune`.

    The report has the layers as the original model numbers them, and the last recipe.
    """
    return reduce(_joined, (prune(model, tokenizer, recipe, texts, **how) for recipe in recipes))


def _joined(first: Report, then: Report) -> Report:
    """The report of two runs, the second one of which numbers the layers that the first one left."""
    return Report.of(
        then.recipe,
        _joined_layers(first.layers, then.layers),
        then.total.parameters,
        then.calibration,
        round(first.seconds + then.seconds, 3),
        (*first.notes, *then.notes),
    )


def _joined_layers(first: Sequence[LayerReport], then: Sequence[LayerReport]) -> list[LayerReport]:
    layers = {layer.layer: layer for layer in first}
    stay = [number for number, layer in layers.items() if not layer.removed]
    for number, later in zip(stay, then, strict=True):
        before = {name: module for name, module in layers[number].modules.items() if name != WHOLE}
        seconds, notes = layers[number].seconds + later.seconds, (*layers[number].notes, *later.notes)
        layers[number] = LayerReport(number, before | later.modules, seconds, notes)
    return list(layers.values())


def planned_passes(model: Any, recipes: Sequence[Recipe]) -> list[LayerReport]:
    """The layers after each recipe in turn, as far as they are known before; of layers that go, the first ones.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        May be on the meta device.
    recipes : sequence of Recipe
    """
    layers: list[LayerReport] = []
    for recipe in recipes:
        planned = planned_layers(model, recipe)[0]
        if recipe.removes_layers:
            goes = removed_layers(len(planned), recipe)
            planned[:goes] = [whole_layer(layer, removed=True) for layer in find_decoder(model).layers[:goes]]
        gone = sum(layer.removed for layer in layers)
        layers = _joined_layers(layers, planned[gone:]) if layers else planned
    return layers


def outside_embeddings(model: Any) -> int:
    """Number of parameters outside the input and output embeddings."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    apart = {id(parameter) for end in ends for parameter in end.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in apart)


def sizes_of(model: Any, recipe: Recipe) -> tuple[Sizes, dict[str, str]]:
    """What can be removed from a model, which may be on the meta device; and what cannot, with the reasons."""
    decoder, left_out = find_decoder(model), {}
    sizes = Sizes(outside_embeddings(model), len(decoder.layers))
    for kind in ("neurons", *HEADS[1:], "layers-by-influence"):
        try:
            sizes = replace(
                sizes, **_sizes(model, decoder, replace(recipe, sparsity_type=kind, multiple_of=None), sizes)
            )
        except InputError as error:
            left_out[kind] = str(error)
    return sizes, left_out


def _sizes(model: Any, decoder: Decoder, recipe: Recipe, sizes: Sizes) -> dict[str, Any]:
    """The fields of the sizes for one sparsity type; raises InputError if the model does not allow it."""
    one = recipe.sparsity_type
    if recipe.removes_layers:
        planned_layers(model, replace(recipe, sparsity_ratio=exact_ratio(1, sizes.layers)))
        layers = {whole_layer(layer).sum("size") for layer in decoder.layers}
        if len(layers) > 1:
            raise InputError("the layers differ in size")
        return {"layer": layers.pop()}
    kind = sparsity_type_of(recipe)
    blocks = kind.blocks(decoder.layers[0], recipe)
    if recipe.whole_neurons:
        layouts = {tuple(mlp.neurons for mlp in layer.mlps) for layer in decoder.layers}
        [of, *others] = {neurons for layout in layouts for neurons in layout}
        if len(layouts) > 1 or others:
            raise InputError("the layers, or the MLPs in a layer, differ in width")
        multiple = lcm(*(aligned(mlp) for layer in decoder.layers for mlp in layer.mlps))
        goes = of - (of // 2 // multiple * multiple or 1)
    else:
        block = blocks[0]
        heads, groups = block.heads or 0, decoder.layers[0].attention.groups  # type: ignore[union-attr]
        of = groups if one == "key-value-groups" else heads // groups
        goes = min(head_steps(heads, groups, recipe.divisible_by)[one], default=0)
        if goes == 0:
            raise InputError(f"no head of {heads} in {groups} groups can go with --divisible-by {recipe.divisible_by}")
    recipe = replace(recipe, sparsity_ratio=exact_ratio(goes, of))
    planned_layers(model, recipe)
    removed = sum(kind.shrinkage(block, recipe) for block in blocks)
    if recipe.whole_neurons:
        return {"neurons": of, "neuron": removed // goes, "aligned": multiple}
    return {"heads": {**sizes.heads, one: (goes, of, removed)}}
