"""What a run would do and cost, found out with one layer in memory."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from torch import nn

from neuronrank_core import Recipe
from neuronrank_core.masking import target_zeros
from neuronrank_torch import corpus
from neuronrank_torch.architecture import find_decoder, prunable_linears, untied_head
from neuronrank_torch.checkpoint import check_output
from neuronrank_torch.cost import estimate_memory, estimate_seconds
from neuronrank_torch.job import Evaluation, Job, choose_device
from neuronrank_torch.models import open_model
from neuronrank_torch.overlap import evaluation_notes
from neuronrank_torch.pipeline import first_pruned, micro_batch
from neuronrank_torch.report import LayerReport, ModuleReport, Report


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
    if statistics is not None:
        statistics.check_model(source)
    model = streamed.model
    decoder = find_decoder(model)
    first, notes = first_pruned(recipe, len(decoder.layers))
    notes += evaluation_notes(text, eval_text, statistics)
    if recipe.allocate != "uniform":
        notes.append("--allocate decides each layer's ratio in the run: only the total below holds")
    layers: list[LayerReport] = []
    for index in range(first, len(decoder.layers)):
        linears = prunable_linears(decoder.layers[index], index, include_attention=recipe.include_attention)
        layers.append(_planned(index, linears, recipe))
    if recipe.prune_lm_head:
        layers.append(_planned("lm_head", {"lm_head": untied_head(model)}, recipe))
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
    return evaluation.seqlen * (evaluation.windows or len(corpus.tokenize(tokenizer, text)) // evaluation.seqlen)


def _planned(layer: int | str, linears: dict[str, nn.Linear], recipe: Recipe) -> LayerReport:
    modules = []
    for name, linear in linears.items():
        rows, columns = linear.out_features, linear.in_features
        if recipe.whole_neurons:
            neurons, others = (columns, rows) if name == "down_proj" else (rows, columns)
            modules.append(ModuleReport(name, rows * columns, 0, int(recipe.ratio * neurons) * others))
        else:
            modules.append(ModuleReport(name, rows * columns, target_zeros(name, (rows, columns), recipe)))
    return LayerReport(layer, tuple(modules), 0.0)
