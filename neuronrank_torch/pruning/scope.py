"""What a run will prune, computed from shapes alone: what cannot be is refused before any costly work."""

from __future__ import annotations

from typing import Any

from torch import nn

from neuronrank_core import Recipe
from neuronrank_core.selection.masks import target_zeros
from neuronrank_torch.model.experts import refuse_modes
from neuronrank_torch.model.structure import (
    find_decoder,
    reported_linears,
    untied_head,
)
from neuronrank_torch.pruning.result import LayerReport, ModuleReport


def planned_layers(model: Any, recipe: Recipe) -> tuple[list[LayerReport], list[str]]:
    """The layers (and the head) that a recipe prunes in a model, with the zeros it will choose.

    Returns
    -------
    layers : list of LayerReport
    notes : list of str
        What the user should know.

    Raises
    ------
    InputError
        If the recipe asks for modules that the model does not have, or that its pattern does not fit.
    MissingStatisticsError
        If the model has no gated MLP.
    """
    decoder = find_decoder(model)
    refuse_modes(decoder.layers, recipe)
    first, notes = first_pruned(recipe, len(decoder.layers))
    layers = [
        _planned(index, reported_linears(layer, index, include_attention=recipe.include_attention), recipe)
        for index, layer in enumerate(decoder.layers)
        if index >= first
    ]
    if recipe.prune_lm_head:
        layers.append(_planned("lm_head", {"lm_head": untied_head(model)}, recipe))
    return layers, notes


def _planned(layer: int | str, linears: dict[str, nn.Linear], recipe: Recipe) -> LayerReport:
    modules = []
    for name, linear in linears.items():
        rows, columns = linear.out_features, linear.in_features
        if recipe.whole_neurons:
            neurons, others = (columns, rows) if name == "down_proj" else (rows, columns)
            modules.append(ModuleReport(name, rows * columns, 0, int(recipe.ratio * neurons) * others))
        else:
            zeros = target_zeros(name.rpartition(".")[2], (rows, columns), recipe)
            modules.append(ModuleReport(name, rows * columns, zeros))
    return LayerReport(layer, tuple(modules), 0.0)


def first_pruned(recipe: Recipe, layers: int) -> tuple[int, list[str]]:
    """First layer that the recipe prunes in a model of so many layers, and what the user should know."""
    last = recipe.pruning_last
    if last is not None and last > layers:
        return 0, [f"--pruning_last is {last} but the model has {layers} layers: all are pruned"]
    return 0 if last is None else layers - last, []
