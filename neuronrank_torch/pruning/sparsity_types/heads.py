"""Removal of attention heads, which leaves a smaller model with an unchanged architecture."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from neuronrank_core import InputError, Recipe, ScoringContext
from neuronrank_core.recipe import HEADS
from neuronrank_core.selection.heads import head_options, kept_heads, lost_share
from neuronrank_core.update.least_squares import absorb
from neuronrank_torch.calibration.gram import Sums
from neuronrank_torch.kernels import inverse
from neuronrank_torch.model.attention import Attention
from neuronrank_torch.model.blocks import Block
from neuronrank_torch.model.resized import resized_tensors
from neuronrank_torch.model.structure import Decoder, Layer
from neuronrank_torch.pruning.result import ModuleReport
from neuronrank_torch.pruning.sparsity_types.base import SparsityType

#: Names of the numbers of query and of key-value heads in a configuration.
QUERIES, GROUPS = "num_attention_heads", "num_key_value_heads"
_HINT = "heads of this model cannot be removed yet: remove neurons, or prune weights instead"


class Heads(SparsityType):
    """Removes the lowest-scoring heads, the same number in every layer: whole groups, or query heads of every group."""

    def handles(self, sparsity_type: str) -> bool:
        """``heads``, ``key-value-groups`` and ``query-heads``."""
        return sparsity_type in HEADS

    def speed(self, recipe: Recipe) -> str:
        """Smaller matrices are."""
        del recipe
        return "yes: the removed heads are neither computed nor stored"

    def blocks(self, layer: Layer, recipe: Recipe) -> Sequence[Block]:
        """The attention alone."""
        del recipe
        if layer.attention is None or layer.attention.heads is None:
            raise InputError(
                f"the attention of layer {layer.index} ({type(layer.module).__name__}) does not consist of"
                " q/k/v/o projections with separate heads",
                hint=_HINT,
            )
        return (layer.attention,)

    def check(self, model: Any, decoder: Decoder, recipe: Recipe) -> None:
        """Refuse a model if its class, configured to fewer heads, would not have the shapes of the pruned model."""
        if self._counts(decoder, recipe) != {_stated(decoder)}:
            raise InputError(
                f"the heads of {type(decoder.body).__name__} are not those of its configuration", hint=_HINT
            )
        self.options(model, decoder, recipe)

    def options(self, model: Any, decoder: Decoder, recipe: Recipe) -> list[Recipe]:
        """The ways that remove equally many heads and that the model's class accepts."""
        config: Any = getattr(decoder.body, "config", None)
        stated = _stated(decoder)
        if finished := self._counts(decoder, recipe) - {stated}:  # By an earlier process
            groups = min(groups for _, groups in finished)
            return [replace(recipe, sparsity_type="query-heads" if groups == stated[1] else "key-value-groups")]
        accepted, refused = [], []
        for way, goes in head_options(*stated, recipe).items():
            try:
                _check_way(model, decoder, config, way, goes)
                accepted.append(replace(recipe, sparsity_type=way))
            except InputError as error:
                refused.append(error)
        if not accepted:
            raise refused[0]
        return accepted

    def _counts(self, decoder: Decoder, recipe: Recipe) -> set[tuple[int, int]]:
        return {_counts(block) for layer in decoder.layers for block in self.blocks(layer, recipe)}

    def stages(self, recipe: Recipe) -> list[tuple[str, ...]]:
        """Only ``o_proj`` is updated."""
        del recipe
        return [("o_proj",)]

    def planned(self, block: Block, recipe: Recipe, *, counted: bool = False) -> dict[str, ModuleReport]:
        """The weights that are removed with the heads. Which zeros are among them is not known before."""
        del counted
        assert isinstance(block, Attention)
        gone, sizes = _share_removed(block, recipe), {role: w.numel() for role, w in block.weights.items()}
        return {block.prefix + role: ModuleReport(size, 0, round(gone[role] * size)) for role, size in sizes.items()}

    def shrinkage(self, block: Block, recipe: Recipe) -> int:
        """The parameters of the removed heads, biases and sinks included."""
        assert isinstance(block, Attention)
        gone, removed = _share_removed(block, recipe), 0.0
        for role, projection in block.projections.items():
            own = projection.module.named_parameters(recurse=False)
            removed += gone[role] * sum(p.numel() for name, p in own if (role, name) != ("o_proj", "bias"))
        per_head = [p.numel() for p in block.module.parameters(recurse=False) if p.shape == (block.heads,)]
        return round(removed + gone["q_proj"] * sum(per_head))

    def lost(self, block: Block, context: ScoringContext) -> float:
        """See :func:`neuronrank_core.selection.heads.lost_share`."""
        assert isinstance(block, Attention)
        return lost_share(context, block.groups)

    def remove(self, block: Block, context: ScoringContext, gram: Sums | None) -> None:
        """Remove the lowest-scoring heads; with ``gram``, let ``o_proj`` compensate for them."""
        assert isinstance(block, Attention)
        output = block.projections["o_proj"]
        kept = torch.as_tensor(kept_heads(context, block.groups), device=output.weight.device)
        fitted = None
        if gram is not None:
            dense = output.with_bias(output.weight.float())
            bias = torch.arange(output.weight.shape[1], dense.shape[1], device=kept.device)
            fitted = absorb(dense, torch.cat([block.features(kept), bias]), gram.gram["o_proj"], inverse)
        block.remove_heads(kept)
        if fitted is not None:
            output.store(fitted)

    def resume(self, layer: Layer) -> None:
        """Set the numbers of heads that the module of attention holds."""
        [block] = self.blocks(layer, Recipe())
        assert isinstance(block, Attention)
        block.count_heads()

    def notes(self, decoder: Decoder, recipe: Recipe) -> list[str]:
        """Which heads were removed."""
        [block] = self.blocks(decoder.layers[0], recipe)
        heads, groups = _counts(block)
        was = getattr(decoder.body.config, QUERIES)
        what = "query heads of every group" if recipe.sparsity_type == "query-heads" else "whole key-value groups"
        return [f"the scores chose {what}: every layer keeps {heads} of {was} attention heads, in {groups} groups"]

    def change_config(self, decoder: Decoder) -> None:
        """Set the numbers of heads, which are the same in every layer, and their size."""
        block = decoder.layers[0].attention
        assert block is not None
        for name, number in _sizes(decoder.body.config, *_counts(block), block.head_dim).items():
            setattr(decoder.body.config, name, number)


def _counts(block: Block) -> tuple[int, int]:
    """Numbers of query and key-value heads of an attention."""
    assert isinstance(block, Attention)
    return block.heads or 0, block.groups


def _share_removed(block: Attention, recipe: Recipe) -> dict[str, float]:
    """By role, the share of the weights that go with the heads, in the first of the recipe's ways."""
    heads, groups = _counts(block)
    way, goes = next(iter(head_options(heads, groups, recipe).items()))
    shares = dict.fromkeys(block.projections, goes / heads)
    return shares | ({"k_proj": 0.0, "v_proj": 0.0} if way == "query-heads" else {})


def _stated(decoder: Decoder) -> tuple[int, int]:
    """The same numbers in the configuration."""
    config = getattr(decoder.body, "config", None)
    heads = int(getattr(config, QUERIES, 0))
    return heads, int(getattr(config, GROUPS, None) or heads)


def _sizes(config: Any, heads: int, groups: int, head_dim: int) -> dict[str, int]:
    """What a configuration has to say about the heads."""
    return {QUERIES: heads, "head_dim": head_dim, **({GROUPS: groups} if hasattr(config, GROUPS) else {})}


def _check_way(model: Any, decoder: Decoder, config: Any, way: str, goes: int) -> None:
    """Refuse a way to remove heads if the model's class would not build the pruned model; raises InputError."""
    block = decoder.layers[0].attention
    assert block is not None
    heads, groups = _counts(block)
    left = heads - goes, groups - (goes * groups // heads if way == "key-value-groups" else 0)
    try:
        resized = resized_tensors(model, config, _sizes(config, *left, block.head_dim))
    except InputError as error:
        raise InputError(
            f"{type(model).__name__} cannot have {left[0]} heads: {error}",
            hint="choose another ratio, or remove neurons instead",
        ) from error
    smaller = ("q_proj", "o_proj") if way == "query-heads" else tuple(block.projections)
    if wrong := sorted(resized.keys() ^ _narrowed(model, decoder, smaller)):
        raise InputError(
            f"with fewer heads, `{wrong[0]}` of {type(model).__name__} would not have the shape that its"
            " configuration describes",
            hint=_HINT,
        )


def _narrowed(model: Any, decoder: Decoder, roles: Collection[str]) -> set[str]:
    """Parameters that lose entries with the heads: of the matrices in these roles, and one entry per head."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: set[str] = set()
    for layer in decoder.layers:
        attention = layer.attention
        assert attention is not None
        per_head = [p for p in attention.module.parameters(recurse=False) if p.shape == (attention.heads,)]
        for role in roles:
            own = attention.projections[role].module.named_parameters(recurse=False)
            per_head += [parameter for name, parameter in own if (role, name) != ("o_proj", "bias")]
        found |= {names[id(parameter)] for parameter in per_head}
    return found


SPARSITY_TYPE = Heads()
