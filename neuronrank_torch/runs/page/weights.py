"""Zeros of a saved model, and the agreement of the methods on the weights to keep."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from neuronrank_core import METHODS, InputError, LayerStatistics, Recipe, ScoringContext, prune_mask
from neuronrank_core.kernels import Kernels
from neuronrank_core.overlap import Overlap, overlap
from neuronrank_core.recipe import LAYERS
from neuronrank_torch.model.blocks import Block
from neuronrank_torch.model.streaming import HEAD, StreamedModel
from neuronrank_torch.model.structure import untied_head
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.layer import module_reports
from neuronrank_torch.pruning.result import WHOLE
from neuronrank_torch.pruning.sparsity_types import sparsity_type_of
from neuronrank_torch.pruning.whole_layers import whole_layer, zeros_of
from neuronrank_torch.runs.prune_result import PruneResult

#: Name of the saved model in the list of methods.
SAVED = "this model"


def saved_zeros(model: StreamedModel, result: PruneResult, *, progress: Progress = silent) -> list[dict[str, Any]]:
    """Count the weights and zeros of every module of a saved model that a run pruned, layer by layer.

    Returns
    -------
    list of dicts
        Number of each layer in the original model, and ``size`` and ``zeros`` by module; of a layer that was removed,
        and in a run that removed only layers, of the layer as a whole.

    Raises
    ------
    InputError
        If the saved model has not the layers that stayed.
    """
    gone = result.removed_layers
    counted: list[dict[str, Any]] = [{"layer": index, "modules": {WHOLE: {"size": 0, "zeros": 0}}} for index in gone]
    layers, passes = model.decoder.layers, result.choice.passes if result.choice else {}
    recipes = [replace(result.recipe, sparsity_type=kind) for kind in passes if kind not in LAYERS] or [result.recipe]
    stay = [index for index in range(len(layers) + len(gone)) if index not in gone]
    if len(stay) != len(layers):
        raise InputError("the layers of the model are not those of neuronrank.json", hint="prune again")
    for index, layer in zip(stay, layers, strict=True):
        progress("counting zeros", layer.index, len(layers), "layers")
        with model.resident(layer.index):
            if result.recipe.removes_layers:
                modules = {WHOLE: {"size": whole_layer(layer).sum("size"), "zeros": zeros_of(layer)}}
            else:
                modules = _counted([b for one in recipes for b in sparsity_type_of(one).blocks(layer, one)])
        counted.append({"layer": index, "modules": modules})
    return sorted(counted, key=lambda one: one["layer"])


def head_zeros(model: StreamedModel) -> dict[str, int]:
    """Count the weights and zeros of the output head of a saved model."""
    with model.resident(HEAD):
        return _counted([untied_head(model.model)])[HEAD]


def _counted(blocks: Sequence[Block]) -> dict[str, dict[str, int]]:
    return {name: {"size": m.size, "zeros": m.zeros} for name, m in module_reports(blocks).items()}


def rival_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """A recipe for every method with the same sparsity and the same TF and IDF. The own method keeps its recipe."""
    same = {name: getattr(recipe, name) for name in ("sparsity_type", "tfidf_mode", "tfidf_k", "q_active", "seed")}
    allocate = "modules" if recipe.differs_by_module else "uniform"
    plain = Recipe(**same, sparsity_ratio=recipe.ratio, allocate=allocate)
    own = replace(recipe, include_attention=False, prune_lm_head=False)
    return {name: own if name == recipe.method else replace(plain, method=name) for name in METHODS}


def method_masks(
    layer: int,
    dense: dict[str, Tensor],
    table: LayerStatistics,
    recipes: dict[str, Recipe],
    kernels: Kernels,
    ratio: float | None,
) -> dict[str, dict[str, Tensor]]:
    """Masks of the MLP of an unpruned layer, by method and module. True means that the weight is set to zero.

    Parameters
    ----------
    layer : int
    dense : dict of Tensor
        The unpruned weights of its matrices.
    table : LayerStatistics
    recipes : dict of Recipe
        By the name of the method on the page.
    kernels : Kernels
    ratio : float, optional
        Sparsity ratio of this layer, if it is not that of the recipes.
    """
    weights = {name: weight.float() for name, weight in dense.items()}
    masks = {}
    for name, recipe in recipes.items():
        context = ScoringContext(layer, recipe, weights, table, kernels, ratio)
        masks[name] = {module: prune_mask(module, context) for module in weights}
    return masks


def agreement(masks: Iterable[dict[str, dict[str, Tensor]]]) -> dict[str, Any]:
    """How many of the kept weights each pair of methods has in common, over all layers and modules.

    Parameters
    ----------
    masks : iterable of dicts
        Of each layer, masks by method and module.

    Returns
    -------
    dict
        ``methods``: their names; ``kept``: Jaccard index of the kept weights of each pair, as a matrix; ``chance``: the
        index of two independent masks, averaged over the pairs.
    """
    pooled: dict[tuple[str, str], Overlap] = {}
    for layer in masks:
        names = list(layer)
        for i, a in enumerate(names):
            for b in names[: i + 1]:
                pairs = (overlap(layer[a][module], layer[b][module]) for module in layer[a])
                pooled[a, b] = sum(pairs, pooled.get((a, b), Overlap()))
    both = {**pooled, **{(b, a): value for (a, b), value in pooled.items()}}
    chance = [value.kept_jaccard_by_chance for (a, b), value in pooled.items() if a != b]
    return {
        "methods": names,
        "kept": [[both[a, b].kept_jaccard for b in names] for a in names],
        "chance": sum(chance) / len(chance),
    }


def zero_masks(model: StreamedModel, layer: int) -> dict[str, Tensor]:
    """Where the MLP of a saved layer is zero, by module."""
    with model.resident(layer):
        weights = model.decoder.layers[layer].mlp.weights
        return {name: weight == 0 for name, weight in weights.items()}
