"""Removal of whole neurons, which leaves a smaller model with an unchanged architecture."""

from typing import Any

import torch

from neuronrank_core import InputError, Recipe, ScoringContext
from neuronrank_core.selection.whole_neurons import kept_neurons
from neuronrank_core.update.least_squares import absorb
from neuronrank_torch.calibration.gram import GramCollector
from neuronrank_torch.kernels import inverse
from neuronrank_torch.model.blocks import Block, Mlp
from neuronrank_torch.model.resized import resized_tensors
from neuronrank_torch.model.structure import Decoder
from neuronrank_torch.pruning.result import ModuleReport
from neuronrank_torch.pruning.sparsity_types.base import SparsityType

#: Names of the width of the MLPs in a configuration. The first that exists is the one; None stands for a default width.
WIDTHS = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size")


class Neurons(SparsityType):
    """Removes the lowest-scoring neurons, the same number in every layer."""

    def handles(self, sparsity_type: str) -> bool:
        """``neurons``."""
        return sparsity_type == "neurons"

    def speed(self, recipe: Recipe) -> str:
        """Smaller matrices are."""
        del recipe
        return "yes: the removed neurons are neither computed nor stored"

    def check(self, model: Any, decoder: Decoder, recipe: Recipe) -> None:
        """Refuse a model if its class, configured to the new width, would not have the shapes of the pruned model."""
        hint = "neurons of this model family cannot be removed yet: prune weights instead"
        config: Any = getattr(decoder.body, "config", None)
        name, dense = _width(decoder), decoder.layers[0].mlp.neurons
        # None stands for a default width.
        if any(layer.mlp.neurons != dense for layer in decoder.layers) or getattr(config, name, 0) not in (dense, None):
            raise InputError(
                f"the width of the MLPs of {type(decoder.body).__name__} is not the {name} of its configuration",
                hint=hint,
            )
        kept = dense - int(recipe.ratio * dense)
        if kept == dense:
            return
        try:
            resized = resized_tensors(model, config, {name: kept})
        except InputError as error:
            raise InputError(
                f"{type(model).__name__} cannot have {kept} neurons in a layer: {error}",
                hint="choose another ratio, or prune weights instead",
            ) from error
        if wrong := sorted(resized.keys() ^ _narrowed(model, decoder)):
            raise InputError(
                f"with fewer neurons, `{wrong[0]}` of {type(model).__name__} would not have the shape that its"
                " configuration describes",
                hint=hint,
            )

    def stages(self, recipe: Recipe) -> list[tuple[str, ...]]:
        """Only ``down_proj`` is updated."""
        del recipe
        return [("down_proj",)]

    def planned(self, block: Block, recipe: Recipe, *, counted: bool = False) -> dict[str, ModuleReport]:
        """The weights that are removed with the neurons. Which zeros are among them is not known before."""
        del counted
        neurons = block.projections["down_proj"].weight.shape[1]
        goes = int(recipe.ratio * neurons)
        sizes = {role: weight.numel() for role, weight in block.weights.items()}
        return {block.prefix + role: ModuleReport(size, 0, goes * (size // neurons)) for role, size in sizes.items()}

    def shrinkage(self, block: Block, recipe: Recipe) -> int:
        """The parameters of the removed neurons, biases included."""
        assert isinstance(block, Mlp)
        own = [p.numel() for module in block.producers for p in module.parameters(recurse=False)]
        own.append(block.projections["down_proj"].weight.numel())
        removed: int = int(recipe.ratio * block.neurons) * (sum(own) // block.neurons)
        return removed

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


def _narrowed(model: Any, decoder: Decoder) -> set[str]:
    """Parameters that lose entries with the neurons: the matrices, and the biases of gate and up."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: set[str] = set()
    for layer in decoder.layers:
        for role, projection in layer.mlp.projections.items():
            own = projection.module.named_parameters(recurse=False)
            found |= {names[id(parameter)] for name, parameter in own if role != "down_proj" or name == "weight"}
    return found


SPARSITY_TYPE = Neurons()
