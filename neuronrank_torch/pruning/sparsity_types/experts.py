"""Removal of whole experts of a mixture, which leaves a smaller model with an unchanged architecture."""

from collections.abc import Sequence
from typing import Any

import torch

from neuronrank_core import InputError, InvalidValueError, Recipe, ScoringContext
from neuronrank_core.recipe import EXPERTS
from neuronrank_core.selection.experts import kept_experts, removed_experts
from neuronrank_torch.calibration.gram import Sums
from neuronrank_torch.model.blocks import Block
from neuronrank_torch.model.depth import forget_predictors
from neuronrank_torch.model.mixture import Mixture, number_of_experts
from neuronrank_torch.model.resized import resized_tensors
from neuronrank_torch.model.structure import Decoder, Layer
from neuronrank_torch.pruning.result import ModuleReport
from neuronrank_torch.pruning.sparsity_types.base import SparsityType

#: Names of the number of experts in a configuration, and of the number that the router chooses for a token.
COUNTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "num_routed_experts")
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "experts_per_token")
_HINT = "experts of this model cannot be removed yet: prune weights instead"


class Experts(SparsityType):
    """Removes the lowest-scoring experts, the same number in every layer that has some."""

    def handles(self, sparsity_type: str) -> bool:
        """``experts``."""
        return sparsity_type == EXPERTS

    def speed(self, recipe: Recipe) -> str:
        """As many experts are computed for a token as before."""
        del recipe
        return "no: a token passes through as many experts as before; the removed ones take no memory"

    def blocks(self, layer: Layer, recipe: Recipe) -> Sequence[Block]:
        """The mixture, if the layer has one."""
        del recipe
        mixture = Mixture.of(layer)
        return () if mixture is None else (mixture,)

    def check(self, model: Any, decoder: Decoder, recipe: Recipe) -> None:
        """Refuse a model if its class, configured to fewer experts, would not have the shapes of the pruned model."""
        mixtures = [mixture for layer in decoder.layers if (mixture := Mixture.of(layer)) is not None]
        body = type(decoder.body).__name__
        if not mixtures:
            raise InputError(
                f"--sparsity_type {EXPERTS} needs a mixture of experts, and {body} is none",
                hint="remove neurons, heads or layers instead",
            )
        first, config = mixtures[0], decoder.body.config
        name = _count(decoder)
        if any(mixture.experts != getattr(config, name, None) for mixture in mixtures):
            raise InputError(f"the number of experts of {body} is not the {name} of its configuration", hint=_HINT)
        first.check_factors()
        left = first.experts - removed_experts(first.experts, first.groups, recipe)
        _check_chosen(config, first, left, recipe)
        try:
            resized = resized_tensors(model, config, {name: left})
        except InputError as error:
            raise InputError(
                f"{type(model).__name__} cannot have {left} experts: {error}", hint="choose another ratio"
            ) from error
        if wrong := sorted(resized.items() ^ _shortened(model, mixtures, left).items()):
            raise InputError(
                f"with fewer experts, `{wrong[0][0]}` of {type(model).__name__} would not have the shape that its"
                " configuration describes",
                hint=_HINT,
            )

    def stages(self, recipe: Recipe) -> list[tuple[str, ...]]:
        """Nothing is updated."""
        del recipe
        return []

    def planned(self, block: Block, recipe: Recipe, *, counted: bool = False) -> dict[str, ModuleReport]:
        """The weights of the removed experts. Which zeros are among them is not known before."""
        del counted
        assert isinstance(block, Mixture)
        goes = removed_experts(block.experts, block.groups, recipe)
        sizes = {role: weight.numel() for role, weight in block.weights.items()}
        return {
            block.prefix + role: ModuleReport(size, 0, goes * (size // block.experts)) for role, size in sizes.items()
        }

    def shrinkage(self, block: Block, recipe: Recipe) -> int:
        """The parameters of the removed experts and of their rows in the router."""
        assert isinstance(block, Mixture)
        entries = sum(t.numel() for _, _, t, _ in block.indexed() if isinstance(t, torch.nn.Parameter))
        return removed_experts(block.experts, block.groups, recipe) * (entries // block.experts)

    def remove(self, block: Block, context: ScoringContext, gram: Sums | None) -> Any:
        """Remove the lowest-scoring experts. Returns their indices."""
        del gram
        assert isinstance(block, Mixture)
        kept, before = kept_experts(context, block.groups), range(block.experts)
        block.remove_experts(torch.as_tensor(kept))
        return tuple(sorted({*before} - {*kept.tolist()}))

    def experts_removed(self, chosen: Any) -> tuple[int, ...]:
        """What :meth:`remove` returned."""
        return tuple(chosen)

    def resume(self, layer: Layer) -> None:
        """Set the numbers of experts that the modules hold."""
        mixture = Mixture.of(layer)
        if mixture is not None:
            mixture.count_experts(number_of_experts(mixture.module))

    def change_config(self, decoder: Decoder) -> None:
        """Set the number of experts, which is the same in every layer that has some."""
        mixture = next(mixture for layer in decoder.layers if (mixture := Mixture.of(layer)) is not None)
        config = decoder.body.config
        setattr(config, _count(decoder), mixture.experts)
        forget_predictors(config)  # They would have all experts.


def _count(decoder: Decoder) -> str:
    """The name under which the configuration states the number of experts."""
    config = getattr(decoder.body, "config", None)
    return next((name for name in COUNTS if isinstance(getattr(config, name, None), int)), COUNTS[0])


def _check_chosen(config: Any, mixture: Mixture, left: int, recipe: Recipe) -> None:
    """Refuse a ratio that leaves fewer experts than the router chooses for a token."""
    chosen = next((number for name in CHOSEN if isinstance(number := getattr(config, name, None), int)), 1)
    groups, allowed = mixture.groups, mixture.groups
    if groups > 1:
        allowed = config.topk_group
    # The router rates a group by its two best experts.
    needed = max(-(-chosen // allowed), 2 if groups > 1 else 1)
    if left // groups < needed:
        of_group = " of each group" if groups > 1 else ""
        raise InvalidValueError(
            "sparsity_ratio",
            recipe.ratio,
            f"one that keeps {needed} of {mixture.experts // groups} experts{of_group}: the router chooses {chosen} for"
            " a token",
        )


def _shortened(model: Any, mixtures: Sequence[Mixture], left: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that lose entries with the experts."""
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return {
        names[id(tensor)]: (*tensor.shape[:axis], left, *tensor.shape[axis + 1 :])
        for mixture in mixtures
        for _, _, tensor, axis in mixture.indexed()
    }


SPARSITY_TYPE = Experts()
