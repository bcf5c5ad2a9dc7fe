"""Scope of a run, computed from shapes alone, so that unsupported requests fail before any costly work."""

from contextlib import nullcontext
from typing import Any

from torch import nn

from neuronrank_core import InputError, Recipe
from neuronrank_core.methods import requires
from neuronrank_core.statistics.table import SAMPLE, SIGNAL
from neuronrank_torch.model.streaming import Resident
from neuronrank_torch.model.structure import Decoder, Layer, find_decoder, untied_head
from neuronrank_torch.pruning.result import LayerReport
from neuronrank_torch.pruning.sparsity_types import sparsity_type_of
from neuronrank_torch.pruning.whole_layers import FEWER_LAYERS, check_whole_layers, whole_layer

#: Fraction of zeros from which a module counts as pruned. Unpruned checkpoints have a few, above all quantised ones.
PRUNED = 0.01


def planned_layers(model: Any, recipe: Recipe, resident: Resident | None = None) -> tuple[list[LayerReport], list[str]]:
    """The layers (and the head) that a recipe prunes in a model, with the numbers of zeros.

    Parameters
    ----------
    model : transformers model
        May be on the meta device.
    recipe : Recipe
    resident : callable, optional
        Context in which a layer or the head has its weights. With it, weights that are zero already are counted: in
        all layers if the first one, or one of the last two units, has more than a few.

    Returns
    -------
    layers : list of LayerReport
    notes : list of str
        Notes for the user.

    Raises
    ------
    InputError
        If the recipe includes modules that the model does not have, or its pattern does not divide their inputs.
    MissingStatisticsError
        If the model has no MLP in a known layout.
    """
    decoder = find_decoder(model)
    if recipe.removes_layers:
        check_whole_layers(model, decoder, recipe)
        return [whole_layer(layer) for layer in decoder.layers], []
    refuse_modes(model, decoder, recipe)
    layers, notes = pruned_layers(decoder, recipe)
    blocks: dict[int | str, Any] = {layer.index: sparsity_type_of(recipe).blocks(layer, recipe) for layer in layers}
    if recipe.prune_lm_head:
        blocks["lm_head"] = [untied_head(model)]
    kind = sparsity_type_of(recipe)
    options = kind.options(model, decoder, recipe)
    if len(options) > 1:
        names = " or ".join(option.sparsity_type for option in options)
        notes.append(
            f"--sparsity_type {recipe.sparsity_type}: the run removes {names}, by their scores; planned is the first"
        )
    recipe = options[0]

    def planned(unit: int | str, *, counted: bool) -> LayerReport:
        with resident(unit) if counted and resident else nullcontext():
            parts = [kind.planned(block, recipe, counted=counted).items() for block in blocks[unit]]
        return LayerReport(unit, {name: report for part in parts for name, report in part})

    units = [*blocks]
    ends = [planned(unit, counted=True) for unit in {*units[:1], *units[-2:]}] if resident else []
    pruned = any(end.sum("zeros_before") >= PRUNED * end.sum("size") for end in ends)
    return [planned(unit, counted=pruned) for unit in units], notes


def pruned_layers(decoder: Decoder, recipe: Recipe) -> tuple[list[Layer], list[str]]:
    """The layers that the recipe prunes, and notes for the user; raises InputError as :meth:`Layer.blocks`."""
    first, notes = first_pruned(recipe, len(decoder.layers))
    bare = [layer for layer in decoder.layers[first:] if not sparsity_type_of(recipe).blocks(layer, recipe)]
    if bare:
        what = "experts" if recipe.removes_experts else "an MLP"
        notes.append(f"layers without {what} are not pruned: {', '.join(str(layer.index) for layer in bare)}")
    layers = [layer for layer in decoder.layers[first:] if layer not in bare]
    of_mlps = not (recipe.removes_heads or recipe.removes_experts)
    tables = [name for layer in layers for name in _tables(layer)] if of_mlps else []
    if tables:  # Doge keeps its routed experts in them.
        notes.append(f"embeddings in an MLP are not pruned: {', '.join(dict.fromkeys(tables))}")
    return layers, notes


def _tables(layer: Layer) -> list[str]:
    """Names of the embeddings in the MLPs of a layer."""
    owners = {id(mlp.module): mlp.module for mlp in layer.mlps if mlp.module is not layer.module}.values()
    return [name for owner in owners for name, module in owner.named_modules() if isinstance(module, nn.Embedding)]


def speed(recipe: Recipe) -> str:
    """Whether a model pruned by a recipe is faster, and why."""
    return FEWER_LAYERS if recipe.removes_layers else sparsity_type_of(recipe).speed(recipe)


def first_pruned(recipe: Recipe, layers: int) -> tuple[int, list[str]]:
    """Index of the first layer that the recipe prunes in a model of ``layers`` layers, and notes for the user."""
    last = recipe.pruning_last
    if last is not None and last > layers:
        return 0, [f"--pruning_last is {last} but the model has {layers} layers: all are pruned"]
    return 0 if last is None else layers - last, []


def refuse_modes(model: Any, decoder: Decoder, recipe: Recipe) -> None:
    """Refuse settings that do not support the model's MLPs.

    Raises
    ------
    InputError
        Names the flag.
    """
    modes = {
        "--sparsity_type neurons": recipe.whole_neurons,
        f"--update {recipe.update}": recipe.update != "none" and not recipe.removes_heads,
        f"--allocate {recipe.allocate}": recipe.differs_by_layer,
    }
    asked = [mode for mode, set_ in modes.items() if set_]
    mixture = next((layer.experts for layer in decoder.layers if layer.experts is not None), None)
    fitted = [mode for mode in asked if mode != "--sparsity_type neurons"]
    if mixture is not None and recipe.updates_toward_model:
        raise InputError(
            f"--update-target model cannot be used on {type(mixture.module).__name__}, a mixture of experts",
            hint="leave it out",
        )
    if mixture is not None and not mixture.weighted and fitted:
        raise InputError(
            f"{fitted[0]} cannot be used on {type(mixture.module).__name__}, which multiplies the inputs of its experts"
            " instead of their outputs",
            hint="leave it out",
        )
    empty = next((layer for layer in decoder.layers if not layer.mlps), None)
    if empty is not None and asked:
        raise InputError(
            f"{asked[0]} needs an MLP in every layer, and layer {empty.index} ({type(empty.module).__name__}) has none",
            hint="leave it out: the other layers can be pruned unstructured or N:M, all at one ratio",
        )
    of_neurons = not (recipe.removes_heads or recipe.removes_experts)
    if recipe.signal == "activated" and of_neurons and requires(recipe) & {SIGNAL, SAMPLE}:
        for mlp in (mlp for layer in decoder.layers for mlp in layer.mlps if mlp.gated):
            mlp.activation  # noqa: B018 (raises)
    sparsity_type_of(recipe).check(model, decoder, recipe)
