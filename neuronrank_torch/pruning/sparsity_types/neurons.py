"""Removal of whole neurons, which leaves a smaller model with an unchanged architecture."""

import torch

from neuronrank_core import InputError, Recipe, ScoringContext
from neuronrank_core.selection.whole_neurons import kept_neurons
from neuronrank_core.update.least_squares import absorb
from neuronrank_torch.calibration.gram import GramCollector
from neuronrank_torch.kernels import inverse
from neuronrank_torch.model.blocks import Block, Mlp
from neuronrank_torch.model.structure import Decoder, Layer
from neuronrank_torch.pruning.result import ModuleReport
from neuronrank_torch.pruning.sparsity_types.base import SparsityType

#: Names of the width of the MLPs in a configuration. The first that exists is the one; None stands for a default width.
WIDTHS = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size")


class Neurons(SparsityType):
    """Removes the lowest-scoring neurons, the same number in every layer."""

    def handles(self, sparsity_type: str) -> bool:
        """``neurons``."""
        return sparsity_type == "neurons"

    def check(self, decoder: Decoder) -> None:
        """Refuse a model if the configuration cannot state the new width, or other weights would have to follow it."""
        hint = "neurons of this model family cannot be removed yet"
        name = _width(decoder)
        width = getattr(getattr(decoder.body, "config", None), name, 0)
        if width is not None and {layer.mlp.neurons for layer in decoder.layers} != {width}:
            raise InputError(
                f"the width of the MLPs of {type(decoder.body).__name__} is not the {name} of its configuration",
                hint=hint,
            )
        others = [name for layer in decoder.layers for name in _other_neuron_weights(layer)]
        if others:
            raise InputError(
                f"`{others[0]}` inside the MLPs of {type(decoder.body).__name__} also has one entry per neuron",
                hint=hint,
            )

    def stages(self, recipe: Recipe) -> list[tuple[str, ...]]:
        """Only ``down_proj`` is updated."""
        del recipe
        return [("down_proj",)]

    def planned(self, block: Block, recipe: Recipe) -> dict[str, ModuleReport]:
        """The weights that are removed with the neurons."""
        neurons = block.projections["down_proj"].weight.shape[1]
        goes = int(recipe.ratio * neurons)
        sizes = {role: weight.numel() for role, weight in block.weights.items()}
        return {block.prefix + role: ModuleReport(size, 0, goes * (size // neurons)) for role, size in sizes.items()}

    def remove(self, block: Block, context: ScoringContext, gram: GramCollector | None) -> None:
        """Remove the lowest-scoring neurons; with ``gram``, let the remaining ones compensate for them."""
        assert isinstance(block, Mlp)
        down = block.projections["down_proj"]
        kept = torch.as_tensor(kept_neurons(context), device=down.weight.device)
        fitted = None
        if gram is not None:
            dense = down.with_bias(down.weight.float())
            bias = torch.arange(block.neurons, dense.shape[1], device=kept.device)
            fitted = absorb(dense, torch.cat([kept, bias]), gram.gram["down_proj"], inverse)
        block.remove_neurons(kept)
        if fitted is not None:
            down.store(fitted)

    def change_config(self, decoder: Decoder) -> None:
        """Set the width to the number of remaining neurons, which is the same in every layer."""
        setattr(decoder.body.config, _width(decoder), decoder.layers[0].mlp.neurons)


def _width(decoder: Decoder) -> str:
    """The name under which the configuration states the width of the MLPs."""
    config = getattr(decoder.body, "config", None)
    return next((name for name in WIDTHS if hasattr(config, name)), WIDTHS[0])


def _other_neuron_weights(layer: Layer) -> list[str]:
    """Parameters inside the MLP that have one entry per neuron, besides the matrices and their biases."""
    mlp = layer.mlp
    if mlp.module is layer.module:  # Its other parts are not those of an MLP.
        return []
    known = {id(parameter) for p in mlp.projections.values() for parameter in p.module.parameters(recurse=False)}
    named = mlp.module.named_parameters()
    return [name for name, parameter in named if mlp.neurons in parameter.shape and id(parameter) not in known]


SPARSITY_TYPE = Neurons()
