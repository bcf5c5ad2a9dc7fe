"""Removal of whole neurons, which leaves a smaller model with an unchanged architecture."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuronrank_core import InputError, InvalidValueError, Recipe, ScoringContext
from neuronrank_core.selection.whole_neurons import kept_neurons, next_neurons, removed_neurons
from neuronrank_core.update.least_squares import absorb, eliminate
from neuronrank_torch.calibration.gram import Sums
from neuronrank_torch.kernels import inverse
from neuronrank_torch.model.blocks import Block, Mlp, routed
from neuronrank_torch.model.experts import resolved
from neuronrank_torch.model.resized import resized_tensors
from neuronrank_torch.model.structure import Decoder, Layer
from neuronrank_torch.pruning.result import ModuleReport
from neuronrank_torch.pruning.sparsity_types.base import SparsityType

#: Names of the width of the MLPs in a configuration. The first that exists is the one; None stands for a default width.
WIDTHS = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size")
#: The same of routed experts, where they have a width of their own, and of shared ones.
EXPERT_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size")
SHARED_WIDTHS = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")

#: Bytes of which the rows of experts' matrices need a multiple in torch's grouped matrix products.
ALIGNED = 16


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
        """Refuse a model if its class, configured to the new widths, would not have the shapes of the pruned model."""
        hint = "neurons of this model family cannot be removed yet: prune weights instead"
        config: Any = getattr(decoder.body, "config", None)
        widths = _widths(decoder)
        for name, neurons in widths.items():
            # None stands for a default width.
            if len(neurons) > 1 or getattr(config, name, 0) not in (*neurons, None):
                raise InputError(
                    f"the width of the MLPs of {type(decoder.body).__name__} is not the {name} of its configuration",
                    hint=hint,
                )
        kept = {name: min(neurons) - removed_neurons(min(neurons), recipe) for name, neurons in widths.items()}
        if {name: {left} for name, left in kept.items()} == widths:
            if recipe.ratio and widths:
                of = max(map(max, widths.values()))
                allowed = f"0, or at least {math.ceil(1e4 / of) / 1e4:g} and below 1, to remove neurons out of {of}"
                raise InvalidValueError("sparsity_ratio", recipe.ratio, allowed)
            return
        _check_aligned(decoder, recipe)
        try:
            resized = resized_tensors(model, config, kept)
        except InputError as error:
            raise InputError(
                f"{type(model).__name__} cannot have {' and '.join(map(str, kept.values()))} neurons in a layer:"
                f" {error}",
                hint="choose another ratio, or prune weights instead",
            ) from error
        sizes = {name: math.prod(shape) for name, shape in resized.items()}
        if wrong := sorted(sizes.items() ^ _narrowed(model, decoder, recipe).items()):
            raise InputError(
                f"with fewer neurons, `{wrong[0][0]}` of {type(model).__name__} would not have the shape that its"
                " configuration describes",
                hint=hint,
            )

    def resume(self, layer: Layer) -> None:
        """Set the number of neurons that the module of experts holds."""
        if layer.experts is not None:
            layer.experts.count_neurons()

    def stages(self, recipe: Recipe) -> list[tuple[str, ...]]:
        """Only ``down_proj`` is updated."""
        del recipe
        return [("down_proj",)]

    def planned(self, block: Block, recipe: Recipe, *, counted: bool = False) -> dict[str, ModuleReport]:
        """The weights that are removed with the neurons. Which zeros are among them is not known before."""
        del counted
        neurons = block.projections["down_proj"].weight.shape[1]
        goes = removed_neurons(neurons, recipe)
        sizes = {role: weight.numel() for role, weight in block.weights.items()}
        return {block.prefix + role: ModuleReport(size, 0, goes * (size // neurons)) for role, size in sizes.items()}

    def shrinkage(self, block: Block, recipe: Recipe) -> int:
        """The parameters of the removed neurons, biases included."""
        assert isinstance(block, Mlp)
        own = [weight.numel() for weight in block.weights.values()]
        own += [p.bias.numel() for role, p in block.projections.items() if role != "down_proj" and p.bias is not None]
        removed: int = removed_neurons(block.neurons, recipe) * (sum(own) // block.neurons)
        return removed

    def remove(self, block: Block, context: ScoringContext, gram: Sums | None) -> Tensor:
        """Remove the lowest-scoring neurons; with ``gram``, a few at a time, and let the others compensate for them.

        Returns the indices of the kept ones. Those of experts are removed by :meth:`finish`, from all at once.
        """
        assert isinstance(block, Mlp)
        down, neurons, fitted = block.projections["down_proj"], block.neurons, None
        if gram is None:
            kept = torch.as_tensor(kept_neurons(context), device=down.weight.device)
        else:
            dense, inputs = down.with_bias(down.weight.float()), gram.gram["down_proj"]

            def choose(weight: Tensor, norm: Tensor, rest: Sequence[int], count: int) -> list[int]:
                own, left = norm[:neurons].double().cpu().numpy(), [index for index in rest if index < neurons]
                return [int(index) for index in next_neurons(context, weight[:, :neurons], own, left, count)]

            gone = eliminate(dense, inputs, choose, removed_neurons(neurons, context.recipe), inverse)
            stay = torch.ones(dense.shape[1], dtype=torch.bool, device=dense.device)
            stay[gone] = False
            [columns] = torch.nonzero(stay, as_tuple=True)
            fitted, kept = absorb(dense, columns, inputs, inverse), columns[columns < neurons]
        if fitted is not None:
            down.store(fitted, kept)
        if block.expert is None:
            block.remove_neurons(kept)
        return kept

    def finish(self, blocks: Sequence[Block], chosen: Sequence[Tensor]) -> None:
        """Remove the neurons of experts."""
        kept = {block: own for block, own in zip(blocks, chosen, strict=True) if routed(block)}
        if kept:
            experts = resolved(next(iter(kept)).module)
            assert experts is not None
            experts.keep_neurons(torch.stack([*kept.values()]))

    def change_config(self, decoder: Decoder) -> None:
        """Set the widths to the numbers of remaining neurons, which are the same in every layer."""
        for name, neurons in _widths(decoder).items():
            setattr(decoder.body.config, name, min(neurons))


def _widths(decoder: Decoder) -> dict[str, set[int]]:
    """The names under which the configuration states the widths of the MLPs, and the widths that these have."""
    config = getattr(decoder.body, "config", None)
    widths: dict[str, set[int]] = {}
    for mlp in (mlp for layer in decoder.layers for mlp in layer.mlps):
        names: tuple[str, ...] = WIDTHS
        if mlp.prefix:
            names = (*EXPERT_WIDTHS, *WIDTHS) if routed(mlp) else SHARED_WIDTHS
        name = next((name for name in names if getattr(config, name, None) is not None), None)
        name = name or next((name for name in names if hasattr(config, name)), names[0])
        if hasattr(config, name) or names != SHARED_WIDTHS:  # Else a multiple of the width of the experts.
            widths.setdefault(name, set()).add(mlp.neurons)
    return widths


def aligned(mlp: Mlp) -> int:
    """What divides the numbers of neurons with which transformers can run an MLP: 1 but for experts."""
    multiple = max(1, ALIGNED // mlp.projections["down_proj"].weight.element_size()) if routed(mlp) else 1
    return multiple if mlp.neurons % multiple == 0 else 1


def _check_aligned(decoder: Decoder, recipe: Recipe) -> None:
    """Refuse a number of neurons with which transformers cannot run experts; raises InputError."""
    for mlp in (mlp for layer in decoder.layers for mlp in layer.mlps):
        multiple, left = aligned(mlp), mlp.neurons - removed_neurons(mlp.neurons, recipe)
        if left % multiple:
            raise InputError(
                f"experts with {left} neurons cannot run: torch multiplies the matrices of experts only if their rows"
                f" take a multiple of {ALIGNED} bytes",
                hint=f"use --multiple-of {multiple}",
            )


def _narrowed(model: Any, decoder: Decoder, recipe: Recipe) -> dict[str, int]:
    """Parameters that lose entries with the neurons, and their sizes: matrices, and the biases of gate and up."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, int] = {}
    for mlp in (mlp for layer in decoder.layers for mlp in layer.mlps):
        goes, neurons = removed_neurons(mlp.neurons, recipe), mlp.neurons
        for role, projection in mlp.projections.items():
            for attribute in (projection.attribute, projection.bias_attribute):
                parameter = getattr(projection.module, attribute, None)
                if parameter is not None and (role != "down_proj" or attribute == projection.attribute):
                    found[names[id(parameter)]] = parameter.numel() // neurons * (neurons - goes)
    return found


SPARSITY_TYPE = Neurons()
