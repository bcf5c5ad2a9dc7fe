"""Calibration text that the model writes itself, sampled from its beginning-of-sequence token."""

from typing import Any

import torch
from torch import Tensor

from neuronrank_core import InputError, Recipe
from neuronrank_torch.evaluation.generation import only_settings
from neuronrank_torch.model.limits import check_positions
from neuronrank_torch.model.open import load_model
from neuronrank_torch.progress import Progress
from neuronrank_torch.runs.job import Job

#: Sequences that are written together, unless the job sets another size of micro-batches.
TOGETHER = 16


def write_text(job: Job, recipe: Recipe, progress: Progress, model: Any = None, tokenizer: Any = None) -> list[str]:
    """Have a model write ``nsamples`` documents of ``seqlen`` tokens; see :func:`sample`.

    Parameters
    ----------
    job : Job
        Names the model, which is loaded whole if ``model`` is None.
    recipe : Recipe
        Number, length and seed.
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`.
    model, tokenizer : transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, optional

    Raises
    ------
    InputError
        If the tokenizer has no token to begin with, or the model fewer positions than ``seqlen``.
    NonFiniteError
        If the model predicts NaN or Inf.
    """
    if model is None:
        progress(f"loading {job.model} whole: it writes the calibration text", 0, 1, "models")
        model, tokenizer, _ = load_model(job.model, dtype=job.dtype, device=job.device)
    check_positions(model, recipe.seqlen)
    tokens = sample(model, first_token(tokenizer), recipe, job.batch_size or TOGETHER, progress)
    return [tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in tokens]


def first_token(tokenizer: Any) -> int:
    """The token that a text begins with: BOS, or EOS in vocabularies with one token for both."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError(
        "--dataset self: the tokenizer has neither a beginning-of-sequence nor an end-of-sequence token to start from",
        hint="name a text with --dataset",
    )


def sample(model: Any, first: int, recipe: Recipe, batch_size: int, progress: Progress) -> list[Tensor]:
    """Sequences that begin with a token and continue at temperature 1, also after the token that ends a text.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    first : int
    recipe : Recipe
        Number, length and seed of the sequences.
    batch_size : int
        Number of sequences that are written together.
    progress : callable

    Returns
    -------
    list of Tensor
        ``nsamples`` times int64, shape (seqlen,).
    """
    rows: list[Tensor] = []

    def step(tokens: Tensor, scores: object) -> Tensor:
        del scores
        done = len(rows) * recipe.seqlen + tokens.numel()
        progress("writing the calibration text", done, recipe.nsamples * recipe.seqlen, "tokens")
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), only_settings(model, do_sample=True, temperature=1.0):
        torch.manual_seed(recipe.seed % 2**63)
        while len(rows) < recipe.nsamples:
            start = torch.full((min(batch_size, recipe.nsamples - len(rows)), 1), first, device=model.device)
            mask = torch.ones_like(start)
            how = {"max_length": recipe.seqlen, "stopping_criteria": [step]}
            rows += model.generate(input_ids=start, attention_mask=mask, **how).cpu()
    return rows
