"""What a run would do and cost, found out with one layer in memory."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from neuronrank_core import Recipe
from neuronrank_torch import corpus
from neuronrank_torch.checkpoint import check_output
from neuronrank_torch.cost import estimate_memory, estimate_seconds
from neuronrank_torch.job import Evaluation, Job, choose_device
from neuronrank_torch.models import open_model
from neuronrank_torch.overlap import evaluation_notes
from neuronrank_torch.pipeline import calibration_sequences, first_pruned, micro_batch
from neuronrank_torch.preflight import planned_layers
from neuronrank_torch.report import Report


def plan_prune(job: Job, recipe: Recipe) -> dict[str, Any]:
    """Check what can be checked cheaply, and say what :func:`neuronrank_torch.job.run_prune` would do.

    Returns
    -------
    dict
        Of the same form as the report of a run, with the zeros that would be chosen, and under ``plan`` the estimates.

    Raises
    ------
    InputError
        If the output, the texts or the model's configuration cannot be used.
    """
    if job.save is not None:
        check_output(job.save, None, job.force)
    statistics = job.statistics()
    if statistics is not None:
        recipe = statistics.fitted(recipe)
    text = job.calibration_text(recipe)
    eval_text = corpus.load_text(job.evaluation.dataset, "evaluation") if job.evaluation else ""
    job = replace(job, device=choose_device(job.device))
    streamed, tokenizer, source = open_model(job.model, dtype=job.dtype, device=job.device)
    if job.save is not None:
        check_output(job.save, source, job.force)
    if statistics is not None:
        statistics.check_model(source)
    model = streamed.model
    layers, notes = planned_layers(model, recipe)
    first = first_pruned(recipe, len(streamed.decoder.layers))[0]
    notes += evaluation_notes(text, eval_text, statistics)
    if recipe.allocate != "uniform":
        notes.append("--allocate decides each layer's ratio in the run: only the total below holds")
    if text:
        calibration_sequences(tokenizer, recipe, text)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = {"tokens": recipe.nsamples * recipe.seqlen} if recipe.needs_text else {}
    calibration = tokens if statistics is None else statistics.calibration()
    report = Report(recipe, tuple(layers), parameters, calibration, 0.0, tuple(notes)).to_dict()
    report["job"] = {**asdict(job), "dry_run": True}
    eval_tokens = _eval_tokens(job.evaluation, tokenizer, eval_text)
    if statistics is not None:  # Scoring by them costs about what scoring by magnitude does: no text is looked at.
        recipe = Recipe("magnitude", include_attention=recipe.include_attention, seqlen=recipe.seqlen)
    report["plan"] = {
        "layer_bytes": streamed.bytes(0),
        "memory": estimate_memory(
            streamed,
            recipe,
            whole=job.save is None,
            hidden_in_memory=job.hidden_states == "memory",
            eval_tokens=eval_tokens,
        ),
        "seconds": estimate_seconds(
            streamed,
            recipe,
            first=first,
            batch_size=min(recipe.nsamples, job.batch_size or micro_batch(recipe)),
            eval_tokens=eval_tokens,
        ),
    }
    return report


def _eval_tokens(evaluation: Evaluation | None, tokenizer: Any, text: str) -> int:
    if evaluation is None:
        return 0
    e, stream = evaluation, corpus.tokenize(tokenizer, text)
    bos = corpus.bos_token(tokenizer)
    return corpus.cut_windows(stream, seqlen=e.seqlen, windows=e.windows, bos=bos, bos_mode=e.bos).size
