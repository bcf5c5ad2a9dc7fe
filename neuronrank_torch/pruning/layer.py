"""Prunes one decoder layer: calibrate, score and mask, update, propagate."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from neuronrank_core import LayerStatistics, Recipe, ScoringContext
from neuronrank_core.methods import method_of, mode
from neuronrank_torch.calibration.attention_outputs import AttentionOutputs
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.dense_stream import DenseStream
from neuronrank_torch.calibration.gram import DenseOutputs, GramCollector
from neuronrank_torch.calibration.layerwise import LayerRun
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.blocks import Block, Mlp, routed
from neuronrank_torch.model.structure import Layer
from neuronrank_torch.pruning.expert_update import ExpertUpdate
from neuronrank_torch.pruning.result import LayerReport, ModuleReport
from neuronrank_torch.pruning.sparsity_types import SparsityType, sparsity_type_of

#: An expert that received fewer calibration tokens is pruned by magnitude. In measurements, Wanda was worse than
#: magnitude with 2 tokens and far better with 8 (docs/understand/experts.md).
MINIMUM_TOKENS = 8

Table = LayerStatistics | None


@dataclass(frozen=True)
class LayerPlan:
    """Settings for pruning one layer, including those that depend on other layers.

    Parameters
    ----------
    recipe : Recipe
    kernels : TorchKernels
    ratio : float, optional
        Share of the MLP's weights to remove; by default the recipe's ratio.
    first : bool
        Whether no layer before it is pruned.
    """

    recipe: Recipe
    kernels: TorchKernels
    ratio: float | None = None
    first: bool = False

    @property
    def sparsity_type(self) -> SparsityType:
        """The sparsity type of the recipe."""
        return sparsity_type_of(self.recipe)

    @property
    def updating(self) -> bool:
        """Whether the remaining weights are updated."""
        return self.recipe.update != "none"

    def stages(self, blocks: Sequence[Block]) -> list[tuple[str, ...]]:
        """Inputs whose Gram matrices are collected in each pass; see :meth:`SparsityType.stages`.

        Those of experts are computed from what one of the passes keeps.
        """
        first, *later = self.sparsity_type.stages(self.recipe) if self.updating else [()]
        return [first, *(stage for stage in later if stage != ("down_proj",) or any(map(_whole_mlp, blocks)))]

    def passes(self, layer: Layer, *, outputs_needed: bool) -> int:
        """Number of passes of the calibration text through a layer."""
        stages = self.stages(self.sparsity_type.blocks(layer, self.recipe))
        propagates = outputs_needed and self.recipe.propagate == "pruned"
        return len(stages) + self.recipe.updates_toward_model + propagates

    def context(self, block: Block, table: Table) -> ScoringContext:
        """Scoring context of a block with its current weights."""
        recipe = replace(self.recipe, method="magnitude") if starved(block, table, self.recipe) else self.recipe
        counts: dict[str, Any] = {"heads": block.heads, "experts": block.experts}
        # Experts are scored by what they do.
        scored = {} if block.experts else {role: weight.float() for role, weight in block.weights.items()}
        return ScoringContext(block.where, recipe, scored, table, self.kernels, self.ratio, **counts)


def prune_layer(run: LayerRun, plan: LayerPlan, ranks: Ranks, *, outputs_needed: bool) -> LayerReport:
    """Calibrate, prune and propagate one layer.

    Parameters
    ----------
    run : LayerRun
        The calibration sequences at the layer's input.
    plan : LayerPlan
    ranks : Ranks
        Processes that share the text; each prunes by the statistics of the whole text.
    outputs_needed : bool
        Whether a later layer or the head needs this layer's output for calibration.
    """
    started, keep = time.perf_counter(), plan.recipe.propagate == "dense"
    blocks = plan.sparsity_type.blocks(run.layer, plan.recipe)
    whole = [block for block in blocks if not routed(block)]
    inputs, *later = plan.stages(blocks)
    experts = ExpertUpdate.of(run, plan.sparsity_type, plan.recipe, ranks)

    # Calibrate: one pass through the dense layer.
    output_needed, seqlen = keep or plan.updating, run.hidden.shape[1]
    collector = LayerCollector(run.layer, blocks, plan.recipe, seqlen, output_needed=output_needed)
    gram = GramCollector(whole, inputs, stop=inputs == ("down_proj",) and not (keep or experts))
    outputs = _dense_outputs(run, whole) if later else None
    stream = _dense_stream(run, plan, outputs.mlp, ranks) if outputs else None
    aim: dict[str, Any] = {"see": partial(stream.aim, outputs)} if stream and outputs else {}
    attention = _attention_outputs(run, plan) if later else None
    recorded = attention.recorded() if attention else nullcontext()
    with collector, gram, outputs or nullcontext(), recorded, experts.recorded(inputs) if experts else nullcontext():
        run.feed(keep=keep, after=lambda start: collector.add_documents(start, seqlen), **aim)
    tables = collector.statistics(ranks)
    gram.sum_over(ranks)

    # Score and mask; update the modules that read the first inputs.
    keeps_dense = plan.updating and plan.sparsity_type.keeps_dense_weights
    memo: dict[int, Any] = {}
    dense = [block.copied(memo) for block in blocks] if keeps_dense else blocks
    before = module_reports(blocks)
    chosen = []
    for block, unpruned, table in zip(blocks, dense, tables, strict=True):
        context = plan.context(unpruned, table)
        if experts and routed(block):
            chosen.append(experts.remove(block, unpruned, context))
        else:
            chosen.append(plan.sparsity_type.remove(block, context, gram if plan.updating else None))
    plan.sparsity_type.finish(blocks, chosen)

    with attention.replayed() if attention else nullcontext():
        # Update the modules that read outputs of pruned modules, with one pass per stage.
        for inputs in later:
            gram = GramCollector(whole, inputs, outputs, stop=inputs == ("down_proj",))
            with gram, experts.recorded(inputs) if experts else nullcontext():
                run.feed(keep=False)
            gram.sum_over(ranks)
            for block, unpruned, table, choice in zip(blocks, dense, tables, chosen, strict=True):
                if not routed(block):
                    plan.sparsity_type.refit(block, plan.context(unpruned, table), choice, gram)
                elif experts:
                    experts.refit(inputs, block, unpruned, plan.context(unpruned, table), choice)

        # Propagate.
        if outputs_needed and not keep:
            run.feed(keep=True)
    report = _report(run.index, blocks, before, _notes(run.index, blocks, tables, plan.recipe), started)
    return replace(report, experts_removed=_experts_removed(plan, chosen))


def _whole_mlp(block: Block) -> bool:
    return isinstance(block, Mlp) and not routed(block)


def _dense_outputs(run: LayerRun, blocks: Sequence[Block]) -> DenseOutputs | None:
    """Room for the outputs of the layer's MLP at all tokens; None if it has only experts."""
    mlps = [block for block in blocks if isinstance(block, Mlp)]
    return DenseOutputs(mlps[0], run.spare("down_proj", len(mlps[0].weights["down_proj"]))) if mlps else None


def _dense_stream(run: LayerRun, plan: LayerPlan, mlp: Mlp, ranks: Ranks) -> DenseStream | None:
    """The dense model's hidden states after the layer, if the update aims at them."""
    if not plan.recipe.updates_toward_model:
        return None
    stream = DenseStream(run, first=plan.first)
    stream.measure(mlp, ranks)
    stream.advance()
    return stream


def _attention_outputs(run: LayerRun, plan: LayerPlan) -> AttentionOutputs | None:
    """Room for the outputs of the layer's attention; None if it is pruned, or on a GPU, where memory matters more."""
    attention = run.layer.attention
    if attention is None or plan.recipe.include_attention or plan.kernels.device.type != "cpu":
        return None
    return AttentionOutputs(attention.module, run.spare("attention", run.hidden.shape[2]))


def prune_by_statistics(
    index: int | str, blocks: Sequence[Block], tables: Sequence[Table], plan: LayerPlan
) -> LayerReport:
    """Prune blocks by existing statistics, or by their weights alone."""
    started = time.perf_counter()
    before = module_reports(blocks)
    chosen = [
        plan.sparsity_type.remove(block, plan.context(block, table), None)
        for block, table in zip(blocks, tables, strict=True)
    ]
    plan.sparsity_type.finish(blocks, chosen)
    report = _report(index, blocks, before, _notes(index, blocks, tables, plan.recipe), started)
    return replace(report, experts_removed=_experts_removed(plan, chosen))


def _experts_removed(plan: LayerPlan, chosen: Sequence[Any]) -> tuple[int, ...]:
    return tuple(expert for choice in chosen for expert in plan.sparsity_type.experts_removed(choice))


def starved(block: Block, table: Table, recipe: Recipe) -> bool:
    """Whether an expert received too few tokens for the recipe's method; never if that uses only the weights."""
    if not isinstance(block, Mlp) or block.expert is None or not method_of(recipe).requires(recipe):
        return False
    if table is None or table.tokens.sum() < MINIMUM_TOKENS:
        return True
    return mode(recipe) == "topic" and table.sample is not None and len(table.sample) < recipe.tfidf_k


def _notes(index: int | str, blocks: Sequence[Block], tables: Sequence[Table], recipe: Recipe) -> tuple[str, ...]:
    """Notes for the user about experts that were pruned by magnitude."""
    few = [
        f"{block.expert} ({0 if table is None else table.tokens.sum()})"
        for block, table in zip(blocks, tables, strict=True)
        if isinstance(block, Mlp) and starved(block, table, recipe)
    ]
    if not few:
        return ()
    return (
        f"layer {index}: these experts received too few calibration tokens (in brackets) and are pruned by magnitude:"
        f" {', '.join(few)}",
    )


def module_reports(
    blocks: Sequence[Block], before: Mapping[str, ModuleReport] | None = None
) -> dict[str, ModuleReport]:
    """Current sparsity of each module, by name; ``before`` is what this function returned before pruning."""
    weights = {block.prefix + role: weight for block in blocks for role, weight in block.weights.items()}
    now = {name: ModuleReport(weight.numel(), int((weight == 0).sum())) for name, weight in weights.items()}
    return {
        name: ModuleReport(was.size, now[name].zeros, was.size - now[name].size, was.zeros)
        for name, was in (before or now).items()
    }


def _report(
    index: int | str,
    blocks: Sequence[Block],
    before: Mapping[str, ModuleReport],
    notes: tuple[str, ...],
    started: float,
) -> LayerReport:
    return LayerReport(index, module_reports(blocks, before), round(time.perf_counter() - started, 3), notes)
