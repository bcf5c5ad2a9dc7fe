"""The last four lines of a pruning run: what was gained, what it cost, and what comes next."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from neuronrank_cli.console import size_text

if TYPE_CHECKING:
    from neuronrank_torch.runs.prune_result import ModelSize, PruneResult

#: Fraction of zeros before pruning that is named.
_NOTABLE = 0.01


def verdict(result: PruneResult) -> list[str]:
    """Weights, size on disk, perplexity, speed with the next command: a line each."""
    return [
        f"weights: {changed(result)}",
        f"size on disk: {_sizes(result)}",
        f"perplexity: {_cost(result)}",
        f"faster: {result.faster}; next: {_next(result)}",
    ]


def changed(result: PruneResult) -> str:
    """What was zeroed or removed, as a share of the whole model before pruning."""
    total, dense = result.total, result.source.parameters if result.source else result.total.parameters
    whole = f"of the {dense:,} parameters of the whole model"
    if total.removed:
        gone = dense - total.parameters
        text = f"{gone:,} {'to remove' if result.plan else 'removed'}, {gone / dense:.2%} {whole}"
        if total.zeros_before > _NOTABLE * total.prunable:  # An update gives zeros other values.
            text += f"; {total.zeros:,} of the {total.zeros_before:,} zeros in these layers are left"
        return text
    text = f"{total.zeros:,} {'to be zero' if result.plan else 'zero'}, {total.zeros / dense:.2%} {whole}"
    if total.zeros == total.zeros_before:
        return f"{text}; none is new" + (": all were zero before" if total.zeros else "")
    if total.zeros_before > _NOTABLE * total.prunable:
        text += f"; {total.zeros_before:,} of them were zero before"
    return text


def _sizes(result: PruneResult) -> str:
    before, after = result.source, result.output
    if before is None or after is None:
        return f"{_size(before)} -> not saved (--save FOLDER)" if before else "not saved (--save FOLDER)"
    text = f"{_size(before)} -> {_size(after)}"
    if after.dtype == "float32" and before.format == "GGUF":
        text += ", half with --dtype bfloat16"
    return text


def _size(size: ModelSize) -> str:
    return f"{size_text(size.bytes)} {size.format} {size.dtype}"


def _cost(result: PruneResult) -> str:
    moved = result.perplexity.divergence if result.perplexity else None
    if moved is None:
        return "not measured (--eval)"
    error = moved.perplexity_change_error
    text = f"{moved.perplexity_change:+.2%}" + (f" (standard error {error:.2%})" if error is not None else "")
    return f"{text}; KL divergence {moved.kl_mean:.4g} nats per token"


def _next(result: PruneResult) -> str:
    if result.output is None or result.job.save is None:
        return "the same command with --save FOLDER"
    model, folder = shlex.quote(result.job.model), shlex.quote(result.job.save)
    if result.perplexity is None:
        return f"neuronrank eval --model {folder} --reference {model}"
    return f"neuronrank compare {model} {folder} --speed" if result.total.removed else f"neuronrank report {folder}"
