"""Single weights are set to zero: unstructured, or N of every M consecutive inputs of a row."""

from functools import partial
from typing import Any

from torch import Tensor

from neuronrank_core import Recipe, ScoringContext, prune_mask
from neuronrank_core.selection.masks import gradual_mask, target_zeros
from neuronrank_core.statistics.table import SHARED_INPUT
from neuronrank_core.update.least_squares import gradual_shares, gradual_update, least_squares_update, residual_norm
from neuronrank_torch.calibration.gram import Sums
from neuronrank_torch.kernels import inverse
from neuronrank_torch.model.blocks import Block
from neuronrank_torch.pruning.result import ModuleReport
from neuronrank_torch.pruning.sparsity_types.base import SparsityType


class Weights(SparsityType):
    """Sets the lowest-scoring weights of each module to zero."""

    keeps_dense_weights = True

    def handles(self, sparsity_type: str) -> bool:
        """``unstructured``, or N:M."""
        return sparsity_type == "unstructured" or ":" in sparsity_type

    def speed(self, recipe: Recipe) -> str:
        """Zeros are not, except in a pattern that kernels use."""
        if recipe.pattern is None:
            return "no: zeros are computed and stored like other weights"
        return f"only with kernels for {recipe.sparsity_type} sparsity: without, zeros are computed like other weights"

    def stages(self, recipe: Recipe) -> list[tuple[str, ...]]:
        """With pruned propagation, every module is updated on its inputs from the pruned modules before it."""
        attention = ("q_proj", "o_proj") if recipe.include_attention else ()
        inputs = (*attention, "gate_proj", "down_proj")
        return [(role,) for role in inputs] if recipe.propagate == "pruned" else [inputs]

    def planned(self, block: Block, recipe: Recipe, *, counted: bool = False) -> dict[str, ModuleReport]:
        """The number of zeros of each module; M of a pattern must divide its number of inputs."""
        found = {}
        for role, weight in block.weights.items():
            zero = weight == 0 if counted else None
            zeros = target_zeros(role, (weight.shape[0], weight.shape[1]), recipe, zero=zero, gated=block.gated)
            before = 0 if zero is None else int(zero.sum())
            found[block.prefix + role] = ModuleReport(weight.numel(), zeros, zeros_before=before)
        return found

    def remove(self, block: Block, context: ScoringContext, gram: Sums | None) -> dict[str, Tensor]:
        """Zero the lowest-scoring weights of each module, scored on its dense weights; returns the masks."""
        masks = {role: prune_mask(role, context) for role in block.projections}
        for role, projection in block.projections.items():
            projection.weight.masked_fill_(masks[role], 0)
        if gram is not None:
            self.refit(block, context, masks, gram)
        return masks

    def refit(self, block: Block, context: ScoringContext, chosen: dict[str, Tensor], gram: Sums) -> None:
        """Fit the remaining weights, and biases, to the outputs of the dense weights, which are in ``context``."""
        for role, projection in block.projections.items():
            inputs = gram.gram.get(SHARED_INPUT.get(role, role))
            if inputs is None:
                continue
            dense, affine = context.weights[role], projection.with_bias(context.weights[role])
            inputs = inputs[: affine.shape[1], : affine.shape[1]]  # Other readers of the same input may have a bias.
            # down_proj also compensates for the pruning of gate and up: its target is what the dense layer returned.
            how: dict[str, Any] = {"target": gram.target if role == "down_proj" else None, "stored": projection.rounded}
            # Without any input, as after the removal of all of gate and up, no choice is better than the first one.
            alive = bool(inputs.diagonal()[: dense.shape[1]].any())
            if context.recipe.update == "gradual" and alive:
                choose = partial(gradual_mask, role, context, residual_norm(inputs, inverse)[: dense.shape[1]])
                how["shares"] = gradual_shares(context.recipe.update_iterations)
                fitted = gradual_update(affine, choose, inputs, inverse, **how)
            else:
                # Zeros of the dense weights stay zero too: they count toward the target.
                how["iterations"] = context.recipe.update_iterations
                fitted = least_squares_update(affine, chosen[role] | (dense == 0), inputs, inverse, **how)
            projection.store(fitted)


SPARSITY_TYPE = Weights()
