"""Plans a run with a target: what would be compared, with estimates of memory and time."""

from dataclasses import replace
from functools import partial

from neuronrank_core import Recipe
from neuronrank_core.mixes import COMPARED_AT, REHEARSED, Target, described, left, passes
from neuronrank_torch.model.open import open_model
from neuronrank_torch.pruning.passes import planned_passes
from neuronrank_torch.runs.dry_run import plan_prune
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.prune_result import PruneResult
from neuronrank_torch.runs.smaller import Candidates, check_text


def plan_smaller(job: Job, recipe: Recipe, target: Target) -> PruneResult:
    """Check all inputs, and plan what :func:`neuronrank_torch.runs.prune.run_prune` would do to reach a target.

    Returns
    -------
    PruneResult
        As of :func:`neuronrank_torch.runs.dry_run.plan_prune`, for the first of the mixes; the notes name all.
    """
    model = open_model(job.model, dtype=job.dtype, device="cpu")[0]
    candidates = Candidates.of(model.model, target, recipe)
    compared = candidates.mixes(target.target_params or COMPARED_AT)
    mix = next(iter(compared.values()))
    own = passes(mix, recipe)
    result = plan_prune(job, own[-1], compared=partial(check_text, candidates, compared.values()))
    assert result.plan is not None
    assert result.source is not None
    # Two models are in memory, and every candidate is pruned with a part of the text.
    twice = 2 * sum(map(model.bytes, range(len(model.decoder.layers))))
    seconds = result.plan.seconds * len(own) * (1 + REHEARSED * len(compared))
    plan = replace(result.plan, memory={**result.plan.memory, "layers": twice}, seconds=seconds)
    parameters = result.source.parameters - candidates.sizes.parameters + left(candidates.sizes, mix)
    layers = planned_passes(model.model, own)
    prunable, removed = (sum(layer.sum(what) for layer in layers) for what in ("size", "removed"))
    total = replace(result.total, parameters=parameters, prunable=prunable, removed=removed)
    names = ", or ".join(map(described, compared.values()))
    notes = *result.notes, f"the run measures which costs least: {names}; planned is the first"
    choice = candidates.result(mix, perplexity={})
    return replace(result, plan=plan, layers=tuple(layers), total=total, choice=choice, notes=notes)
