"""Continuations of a few prompts before and after pruning."""

from pathlib import Path
from typing import Any

from neuronrank_torch.evaluation.generation import PROMPTS, SAMPLE_TOKENS, Sample, continuations
from neuronrank_torch.model.open import load_model
from neuronrank_torch.progress import Progress
from neuronrank_torch.runs.job import Job


def write_samples(job: Job, tokenizer: Any, pruned: Any, progress: Progress) -> tuple[Sample, ...]:
    """Continue the prompts with the model of a job, and with the pruned one: a loaded model, or the path of its folder.

    Other models are loaded whole, one after the other.
    """
    texts = []
    for when, model in (("before", job.model), ("after", pruned)):
        progress(f"writing samples {when} pruning", 0, 1, "models")
        if isinstance(model, str | Path):
            model = load_model(str(model), dtype=job.dtype, device=job.device)[0]
        texts.append(continuations(model, tokenizer, PROMPTS, SAMPLE_TOKENS))
    return tuple(map(Sample, PROMPTS, *texts))
