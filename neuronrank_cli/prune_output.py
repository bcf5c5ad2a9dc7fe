"""What ``neuronrank prune`` prints of its result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neuronrank_cli.console import decimal, perplexity_text, print_table, protocol, say, size_text
from neuronrank_cli.verdict import changed, verdict
from neuronrank_core.selection.layers import removed_layers

if TYPE_CHECKING:
    from neuronrank_torch.runs.choice import Choice
    from neuronrank_torch.runs.prune_result import Plan, PruneResult


def print_result(result: PruneResult, *, verbose: bool = False) -> None:
    """Print what a run did to the layers, the perplexities and the verdict, or the estimates of a dry run."""
    job, recipe, planned = result.job, result.recipe, result.plan is not None
    sized = result.choice is not None and bool(result.choice.passes)
    goal = "smaller" if sized else f"{recipe.sparsity_ratio:.4g} {recipe.sparsity_type}"
    method = "" if recipe.removes_layers else f"{recipe.method}, "
    say(f"{job.model}: {method}{goal}{', planned' if planned else ''}")
    (_print_layers if verbose else _print_summary)(result)
    if result.choice:
        (_print_sized if sized else _print_choice)(result.choice)
    if result.perplexity and job.evaluation:
        say(f"perplexity before: {perplexity_text(result.perplexity.before)}")
        say(f"perplexity after:  {perplexity_text(result.perplexity.after)}")
        say(f"measured on: {protocol(job.evaluation.dataset, result.perplexity.after)}")
    for sample in result.samples:
        say(f"sample: {_one_line(sample.prompt)}")
        say(f"  before: {_one_line(sample.before)}")
        say(f"  after:  {_one_line(sample.after)}")
    if result.plan:
        say(f"weights: {changed(result)}")
        if result.calibration.tokens:
            text = result.calibration.dataset or job.dataset
            say(f"calibration: {recipe.nsamples} sequences of {recipe.seqlen} tokens of {text}")
        _print_plan(result.plan)
        return
    compared = f", after {_duration(result.choice.seconds)} of comparison" if result.choice else ""
    say(f"time: {_duration(result.seconds)}{compared}")
    if job.save:
        say(f"saved to: {job.save}")
    for line in verdict(result):
        say(line)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _print_summary(result: PruneResult) -> None:
    """Print the sparsity of the layers in one line."""
    if result.recipe.removes_layers and result.plan:
        goes = removed_layers(len(result.layers), result.recipe)
        say(f"{goes} of {len(result.layers)} layers to remove, with {result.total.removed:,} parameters")
        return
    if result.recipe.removes_layers:
        listed, parameters = ", ".join(map(str, result.removed_layers)), f"{result.total.removed:,} parameters"
        say(f"{len(result.removed_layers)} of {len(result.layers)} layers removed ({listed}), with {parameters}")
        return
    gone = "removed" if result.total.removed else "zeros"
    shares = [layer.sum(gone) / layer.sum("size") for layer in result.layers if layer.sum("size")]
    low, high = min(shares, default=0.0), max(shares, default=0.0)
    each = f"{low:.4%} in each" if low == high else f"{low:.2%} to {high:.2%} in each (--verbose lists them)"
    lost, verb = getattr(result.total, gone), gone if gone == "removed" else "zero"
    layers = f"{len(result.layers)} layer{'s' * (len(result.layers) != 1)}"
    say(f"{layers}: {lost:,} of {result.total.prunable:,} weights {verb}, {each}")


def _print_choice(choice: Choice) -> None:
    good, best = choice.perplexity["good"], choice.perplexity[choice.chosen]
    others = ", ".join(
        f"{name} {decimal(value)}{' (not clearly lower)' if value < best else ''}"
        for name, value in choice.perplexity.items()
        if name != choice.chosen
    )
    gain = "" if choice.chosen == "good" else f", {1 - best / good:.2%} below good"
    say(f"effort best: chose {choice.chosen}: held-out perplexity {decimal(best)}{gain}; others: {others or 'none'}")
    _print_left_out(choice)


def _print_sized(choice: Choice) -> None:
    """Print what was removed to reach a size, why, and what was compared."""
    if choice.dense is not None:
        own = choice.perplexity[choice.chosen]
        why = (
            f"held-out perplexity {decimal(own)}, {own / choice.dense - 1:+.2%} from the dense {decimal(choice.dense)}"
        )
        say(f"chose: {choice.chosen}: {why}")
        for name, value in choice.perplexity.items():
            if name != choice.chosen:
                say(f"compared: {name}: {decimal(value)}, {value / choice.dense - 1:+.2%}")
    _print_left_out(choice)
    share = f"{choice.kept / choice.parameters:.2%} of the {choice.parameters:,} parameters outside the embeddings"
    say(f"size: {share}; the width of the MLPs is a multiple of {choice.multiple_of}")


def _print_left_out(choice: Choice) -> None:
    for name, reason in choice.left_out.items():
        say(f"left out: {name}: {reason}")


def _print_plan(plan: Plan) -> None:
    parts = {name: size for name, size in plan.memory.items() if size}
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    say(f"size of a layer: {size_text(plan.layer_bytes)}")
    say(f"peak memory: about {size_text(sum(parts.values()))}: {listed}")
    say(f"time: about {_duration(plan.seconds)}, extrapolated from the first layer")
    if plan.efforts:
        say("by effort: " + ", ".join(f"{name} {_duration(seconds)}" for name, seconds in plan.efforts.items()))
    say("dry run: nothing was calibrated, pruned or saved")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 120 else f"{seconds:.0f} s"


def _print_layers(result: PruneResult) -> None:
    """Print the sparsity by layer and in total; for a run that is done, with the time that each layer took."""
    total, gone = result.total, "removed" if result.total.removed else "zeros"
    headings = ("layer", "weights", gone, "sparsity", "seconds")[: 4 if result.plan else 5]

    def cells(name: str, size: int, lost: int, seconds: float) -> list[str]:
        share = lost / size if size else 0.0
        return [name, f"{size:,}", f"{lost:,}", f"{share:.4%}", f"{seconds:.1f}"][: len(headings)]

    rows = [cells(str(layer.layer), layer.sum("size"), layer.sum(gone), layer.seconds) for layer in result.layers]
    print_table(headings, rows, total=cells("total", total.prunable, getattr(total, gone), result.seconds))
    for layer in result.layers:
        if layer.experts_removed:
            say(f"layer {layer.layer}: experts removed: {', '.join(map(str, layer.experts_removed))}")
