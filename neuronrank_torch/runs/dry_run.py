"""Plans a run, and estimates its memory and time with one layer in memory."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from neuronrank_core import Recipe
from neuronrank_core.effort import windows_held_out
from neuronrank_core.methods import check_method, check_recipe, needs_text
from neuronrank_core.selection.layers import removed_layers
from neuronrank_torch.calibration.layerwise import LayerRun, run_layers
from neuronrank_torch.distributed.ranks import ALONE
from neuronrank_torch.evaluation.windows import STREAMED_TOKENS
from neuronrank_torch.files.durable import check_output
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.blocks import routed
from neuronrank_torch.model.limits import check_positions, check_tokens
from neuronrank_torch.model.open import open_model
from neuronrank_torch.model.streaming import HEAD, REST, StreamedModel
from neuronrank_torch.model.structure import Layer
from neuronrank_torch.pruning.layer import LayerPlan, prune_by_statistics, prune_layer
from neuronrank_torch.pruning.result import Calibration, Report
from neuronrank_torch.pruning.scope import first_pruned, planned_layers, pruned_layers, speed
from neuronrank_torch.pruning.sparsity_types import sparsity_type_of
from neuronrank_torch.pruning.whole_layers import check_number, held_out, whole_layer
from neuronrank_torch.runs.early_notes import early_notes
from neuronrank_torch.runs.job import Job, read_inputs
from neuronrank_torch.runs.own_text import first_token
from neuronrank_torch.runs.prune_result import JobRecord, ModelSize, Plan, PruneResult
from neuronrank_torch.saving.names import Names
from neuronrank_torch.text.sequences import calibration_sequences, evaluation_windows, micro_batch


def plan_prune(
    job: Job,
    recipe: Recipe,
    efforts: Mapping[str, Sequence[Recipe]] | None = None,
    *,
    compared: Callable[[Any, str], None] | None = None,
) -> PruneResult:
    """Check all inputs, and plan what :func:`neuronrank_torch.runs.prune.run_prune` would do.

    Parameters
    ----------
    job : Job
    recipe : Recipe
    efforts : dict, optional
        The recipes that each effort level runs one after another, to estimate their time.
    compared : callable, optional
        If the run compares recipes on held-out calibration text: ``compared(tokenizer, text)`` checks the text.

    Returns
    -------
    PruneResult
        As a run would return it, with the numbers of zeros that pruning would create, and with the estimates.

    Raises
    ------
    InputError
        If the output, the texts or the model's configuration cannot be used.
    """
    # With statistics, the rest is checked when they are read.
    (check_recipe if job.stats is None else check_method)(recipe)
    inputs = read_inputs(job, recipe, compares=compared is not None)
    job, recipe, statistics = inputs.job, inputs.recipe, inputs.statistics
    streamed, tokenizer, source = open_model(job.model, dtype=job.dtype, device=job.device)
    saved: list[str] = []
    if job.save is not None:
        check_output(job.save, job.force, source=source.path, label=source.spec)
        saved = Names.of(streamed, smaller=recipe.structured).notes()
    if statistics is not None:
        statistics.check_model(source)
    model = streamed.model
    text, eval_text = inputs.texts(tokenizer)
    layers, notes = planned_layers(model, recipe, streamed.resident)
    notes[:0] = source.notes
    first = first_pruned(recipe, len(streamed.decoder.layers))[0]
    notes += [*early_notes(inputs, text, eval_text, tokenizer, streamed.decoder), *saved]
    if inputs.writes_text:
        first_token(tokenizer)
        check_positions(model, recipe.seqlen)
        notes.append(
            "--dataset self: a dry run writes no text; a run loads the whole model to write it, and takes longer than "
            "estimated"
        )
    if recipe.differs_by_layer:
        notes.append("--allocate sets the ratio of each layer during the run: only the total below is exact")
    if text:
        sequences = calibration_sequences(tokenizer, recipe, text)
        check_tokens(model, sequences)
        if recipe.removes_layers:
            check_number(sequences)
        if compared is not None:
            compared(tokenizer, text)
    dense = ModelSize.of(source, sum(p.numel() for p in model.parameters()))
    removed = removed_parameters(streamed, recipe)
    if recipe.removes_layers:
        notes.append("which layers go is measured during the run: planned are so many of average size")
    tokens = {"tokens": recipe.nsamples * recipe.seqlen} if needs_text(recipe) else {}
    calibration = Calibration(**(tokens if statistics is None else statistics.calibration()))
    report = Report.of(streamed.decoder.measured(recipe), layers, dense.parameters - removed, calibration, notes=notes)
    if recipe.removes_layers:
        report = replace(report, total=replace(report.total, removed=removed))
    record = JobRecord(**vars(job), model_type=source.model_type, dry_run=True)
    if statistics is not None:  # No text is processed, so it takes about as long as pruning by magnitude.
        recipe = Recipe("magnitude", include_attention=recipe.include_attention, seqlen=recipe.seqlen)
    e, eval_tokens = job.evaluation, 0
    if e is not None:
        cut = evaluation_windows(tokenizer, eval_text, seqlen=e.seqlen, windows=e.windows, bos_mode=e.bos)
        eval_tokens = cut.size
    batch_size = min(recipe.nsamples, job.batch_size or micro_batch(recipe))
    # Levels of effort share recipes with each other and with the run.
    estimate = cache(partial(estimate_seconds, streamed, first=first, batch_size=batch_size))

    def all_seconds(recipes: Sequence[Recipe]) -> float:
        *candidates, chosen = recipes
        measured = sum(estimate(one, read=windows_held_out(one) * one.seqlen) for one in candidates)
        return measured + estimate(chosen, read=2 * eval_tokens)

    plan = Plan(
        streamed.bytes(0),
        estimate_memory(
            streamed,
            recipe,
            job,
            eval_tokens,
            whole=job.save is None or inputs.writes_text,
            twice=bool(eval_tokens) or compared is not None,
        ),
        all_seconds([recipe]),
        {name: all_seconds(recipes) for name, recipes in (efforts or {}).items()},
    )
    return PruneResult(**vars(report), job=record, plan=plan, source=dense, faster=speed(report.recipe))


def removed_parameters(model: StreamedModel, recipe: Recipe) -> int:
    """The number of parameters that will leave a model; of layers of average size, as which ones go is not known."""
    if recipe.removes_layers:
        sizes = [whole_layer(layer).sum("size") for layer in model.decoder.layers]
        return round(sum(sizes) * removed_layers(len(sizes), recipe) / len(sizes))
    kind = sparsity_type_of(recipe)
    option = kind.options(model.model, model.decoder, recipe)[0]
    layers = pruned_layers(model.decoder, recipe)[0]
    return sum(kind.shrinkage(block, option) for layer in layers for block in kind.blocks(layer, recipe))


#: Python, torch, transformers, and the activations of a micro-batch.
PROGRAM_BYTES = 600 << 20
#: Positions for which the head is timed.
HEAD_TOKENS = 64
#: Scores, sort keys and masks, for each weight of the largest module.
SCORING_BYTES = 24
#: Gram matrices and the solve with them in double precision, for each pair of inputs of the widest module.
GRAM_BYTES = 36


def estimate_memory(
    model: StreamedModel, recipe: Recipe, job: Job, eval_tokens: int, *, whole: bool, twice: bool
) -> dict[str, int]:
    """Estimate the peak memory of a run, in bytes, part by part.

    Parameters
    ----------
    model : StreamedModel
    recipe : Recipe
    job : Job
        Says whether the model is saved, and whether hidden states are in memory.
    eval_tokens : int
        Tokens of the evaluation text.
    whole : bool
        Whether the whole model is in memory at some time.
    twice : bool
        Whether the model is opened once more, to be evaluated beside the pruned one or to be pruned as a candidate.
    """
    layers = [model.bytes(index) for index in range(len(model.decoder.layers))]
    example, whole = _example_layer(model, recipe), whole or recipe.removes_layers
    blocks = example.mlps if recipe.removes_layers else sparsity_type_of(recipe).blocks(example, recipe)
    weights = [weight for block in blocks for weight in block.weights.values()]
    token = model.model.config.get_text_config().hidden_size * weights[0].element_size()
    calibration = recipe.nsamples * recipe.seqlen if needs_text(recipe) and job.hidden_states == "memory" else 0
    if recipe.removes_layers:
        calibration = 0  # The text runs through the whole model.
    elif recipe.update != "none":
        # The outputs of the dense MLP and, on a CPU, those of attention are kept too; and the inputs of the experts.
        stages = len(LayerPlan(recipe, TorchKernels(model.device)).stages(blocks))
        kept = (stages > 1) * (1 + (model.device.type == "cpu" and not recipe.include_attention))
        calibration *= 1 + kept + any(map(routed, blocks)) + recipe.updates_toward_model
    evaluation = (1 if whole else 2) * min(eval_tokens, STREAMED_TOKENS)
    widest = max(weight.shape[1] for weight in weights)
    copies = 0 if weights[0].dtype == torch.float32 else 4 * sum(weight.numel() for weight in weights)
    return {
        # On a GPU, the next layer is there too.
        "layers": sum(layers) if whole else max(layers) * (1 + (model.read_ahead is not None)),
        "embeddings": (model.bytes(REST) + model.bytes(HEAD)) * (1 + twice),
        "hidden states": token * max(calibration, evaluation),
        # Experts have one score each.
        "scoring": 0 if recipe.removes_experts else SCORING_BYTES * max(weight.numel() for weight in weights) + copies,
        "update": GRAM_BYTES * widest**2 if recipe.update != "none" else 0,
        "program": PROGRAM_BYTES,
    }


def estimate_seconds(model: StreamedModel, recipe: Recipe, *, first: int, batch_size: int, read: int) -> float:
    """Estimate the time of a run by pruning its first layer with an MLP, with one micro-batch; it is discarded.

    Parameters
    ----------
    model : StreamedModel
    recipe : Recipe
    first : int
        First layer that is pruned.
    batch_size : int
        Sequences in a micro-batch.
    read : int
        Tokens whose likelihood is measured, of all texts and models together.
    """
    layers = len(model.decoder.layers)
    # One micro-batch may hold fewer tokens than there are topics.
    plan = LayerPlan(replace(recipe, tfidf_mode="doc"), TorchKernels(model.device), first=True)
    passes: float
    if recipe.removes_layers:
        passes = _removal_passes(layers, recipe)
    else:
        every = enumerate(model.decoder.layers)
        passes = sum(plan.passes(one, outputs_needed=i + 1 < layers) if i >= first else 1 for i, one in every)
    if recipe.differs_by_layer or recipe.sparsity_type == "heads":
        passes += layers
    forward = prune = 0.0

    def visit(run: LayerRun) -> None:
        nonlocal forward, prune
        started = time.perf_counter()
        run.feed(keep=False)
        forward = time.perf_counter() - started
        if run.index < example or recipe.removes_layers:
            return
        started = time.perf_counter()
        if needs_text(recipe):
            prune_layer(run, plan, ALONE, outputs_needed=False)
            prune = time.perf_counter() - started - forward * plan.passes(run.layer, outputs_needed=False)
        else:
            blocks = plan.sparsity_type.blocks(run.layer, recipe)
            prune_by_statistics(0, blocks, [None] * len(blocks), plan)
            prune = time.perf_counter() - started

    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    seqlen = recipe.seqlen if needs_text(recipe) or read else 2
    tokens = torch.randint(vocabulary, (batch_size, seqlen), generator=torch.Generator().manual_seed(0))
    example = (layer := _example_layer(model, recipe)).index
    if not recipe.removes_layers:
        with model.resident(example):
            plan.sparsity_type.resume(layer)  # An earlier estimate left it with the numbers of a pruned one.
    only = replace(model.decoder, layers=model.decoder.layers[: example + 1])
    with torch.no_grad():
        run_layers(only, tokens.to(model.device), visit, batch_size=batch_size, resident=model.resident)
    batches = -(-recipe.nsamples // batch_size) if needs_text(recipe) else 0
    evaluation = layers * read / tokens.numel()
    head = read * _head_seconds(model) if read else 0.0
    return forward * (batches * passes + evaluation) + head + max(0.0, prune) * (layers - first)


def _head_seconds(model: StreamedModel) -> float:
    """Time of the head, per token."""
    head = model.model.get_output_embeddings()
    if head is None:
        return 0.0
    with torch.no_grad(), model.resident(HEAD):
        hidden = head.weight.new_zeros((HEAD_TOKENS, head.weight.shape[1]))
        started = time.perf_counter()
        head(hidden).float().log_softmax(-1).sum().item()  # The sum waits for a GPU.
        return (time.perf_counter() - started) / HEAD_TOKENS


def _removal_passes(layers: int, recipe: Recipe) -> float:
    """How often the calibration text runs through one layer, all in all, when layers are removed."""
    held = held_out(recipe.nsamples, recipe.seqlen) / recipe.nsamples
    depths = range(layers, layers - removed_layers(layers, recipe), -1)
    greedy, updating = recipe.sparsity_type == "layers", recipe.update != "none"
    measured = (1 - held) * (sum(depths) * updating + layers * (not greedy))
    return measured + held * (layers + sum(depth * (depth - 1 if greedy else 1) for depth in depths))


def _example_layer(model: StreamedModel, recipe: Recipe) -> Layer:
    """The first layer with an MLP; with experts, if these are removed."""
    layers = [layer for layer in model.decoder.layers if layer.mlps]
    kind = None if recipe.removes_layers else sparsity_type_of(recipe)
    return next(layer for layer in layers if kind is None or kind.blocks(layer, recipe))
