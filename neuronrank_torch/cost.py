"""What a run will cost, estimated from the sizes of a model and one layer that is pruned for a measurement."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from neuronrank_core import Recipe
from neuronrank_torch.architecture import Decoder, reported_linears
from neuronrank_torch.executor import LayerRun, run_layers
from neuronrank_torch.expert_pruner import ExpertPruner
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.perplexity import STREAMED_TOKENS
from neuronrank_torch.streamed_model import HEAD, REST, StreamedModel

#: Python, torch, transformers, and the activations of a micro-batch.
PROGRAM_BYTES = 600 << 20
#: Scores, sort keys and masks, for each weight of the largest module.
SCORING_BYTES = 24
#: Gram matrices and the solve with them in double precision, for each pair of inputs of the widest module.
GRAM_BYTES = 36


def estimate_memory(
    model: StreamedModel, recipe: Recipe, *, whole: bool, hidden_in_memory: bool, eval_tokens: int
) -> dict[str, int]:
    """Estimate the peak memory of a run, in bytes, part by part.

    Parameters
    ----------
    model : StreamedModel
    recipe : Recipe
    whole : bool
        Whether the run has the whole model in memory.
    hidden_in_memory : bool
        Whether hidden states are, or in a file.
    eval_tokens : int
        Tokens that perplexity is measured on.
    """
    layers = [model.bytes(index) for index in range(len(model.decoder.layers))]
    linears = reported_linears(model.decoder.layers[0], 0, include_attention=recipe.include_attention).values()
    weights = [linear.weight for linear in linears]
    token = model.model.config.get_text_config().hidden_size * weights[0].element_size()
    calibration = recipe.nsamples * recipe.seqlen if recipe.needs_text and hidden_in_memory else 0
    evaluation = 0 if whole else min(eval_tokens, STREAMED_TOKENS)
    widest = max(weight.shape[1] for weight in weights)
    copies = 0 if weights[0].dtype == torch.float32 else 4 * sum(weight.numel() for weight in weights)
    return {
        "layers": sum(layers) if whole else max(layers),
        "embeddings": model.bytes(REST) + model.bytes(HEAD),
        "hidden states": token * max(calibration, evaluation),
        "scoring": SCORING_BYTES * max(weight.numel() for weight in weights) + copies,
        "update": GRAM_BYTES * widest**2 if recipe.update != "none" else 0,
        "program": PROGRAM_BYTES,
    }


def estimate_seconds(model: StreamedModel, recipe: Recipe, *, first: int, batch_size: int, eval_tokens: int) -> float:
    """Estimate the time of a run from its first layer, pruned with one micro-batch and then forgotten.

    Parameters
    ----------
    model : StreamedModel
    recipe : Recipe
    first : int
        First layer that is pruned.
    batch_size : int
        Sequences in a micro-batch.
    eval_tokens : int
        Tokens that perplexity is measured on, before and after.
    """
    layers = len(model.decoder.layers)
    # One micro-batch may hold fewer tokens than there are topics.
    pruner = ExpertPruner(replace(recipe, tfidf_mode="doc"), TorchKernels(model.device), lambda layer: None)
    passes = sum(pruner.passes(outputs_needed=index + 1 < layers) if index >= first else 1 for index in range(layers))
    if recipe.allocate != "uniform":
        passes += layers
    forward = prune = 0.0

    def visit(run: LayerRun) -> None:
        nonlocal forward, prune
        started = time.perf_counter()
        run.feed(keep=False)
        forward = time.perf_counter() - started
        started = time.perf_counter()
        if recipe.needs_text:
            pruner.visit(run, outputs_needed=False)
            prune = time.perf_counter() - started - forward * pruner.passes(outputs_needed=False)
        else:
            pruner.by_statistics(0, run.layer, None)
            prune = time.perf_counter() - started

    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    seqlen = recipe.seqlen if recipe.needs_text or eval_tokens else 2
    tokens = torch.randint(vocabulary, (batch_size, seqlen), generator=torch.Generator().manual_seed(0))
    only = Decoder(model.decoder.body, model.decoder.layers[:1])
    with torch.no_grad():
        run_layers(only, tokens.to(model.device), visit, batch_size=batch_size, resident=model.resident)
    batches = -(-recipe.nsamples // batch_size) if recipe.needs_text else 0
    evaluation = 2 * layers * eval_tokens / tokens.numel()
    return forward * (batches * passes + evaluation) + max(0.0, prune) * (layers - first)
