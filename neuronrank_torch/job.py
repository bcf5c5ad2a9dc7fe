"""A whole run from a model's name to a saved folder: what the command line calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch

from neuronrank_core import Recipe
from neuronrank_torch import corpus
from neuronrank_torch.checkpoint import check_output, save_model
from neuronrank_torch.models import Dtype, load_model
from neuronrank_torch.perplexity import Perplexity, evaluate
from neuronrank_torch.pipeline import prune

#: Called with (what is going on, steps done, steps in all).
OnStage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """How to measure perplexity.

    Parameters
    ----------
    dataset : str
        As :func:`neuronrank_torch.corpus.load_text` takes it.
    seqlen : int
        Tokens in a window.
    windows : int, optional
        How many; all by default.
    bos : {"window", "text"}
        Where a beginning-of-sequence token stands.
    """

    dataset: str = "builtin"
    seqlen: int = 512
    windows: int | None = None
    bos: Literal["window", "text"] = "window"


@dataclass(frozen=True)
class Job:
    """Where a run gets what it needs and where it puts the result; the recipe says what happens between.

    Parameters
    ----------
    model, dataset : str
        As :func:`neuronrank_torch.models.load_model` and :func:`neuronrank_torch.corpus.load_text` take them.
    save : str, optional
        Output folder; nothing is saved by default.
    force : bool
        Replace an existing output.
    device : str
        ``auto`` is CUDA where there is one, else the CPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Of the weights.
    batch_size : int, optional
        Sequences in a micro-batch.
    evaluation : Evaluation, optional
        Perplexity before and after; not measured by default.
    """

    model: str
    dataset: str = "builtin"
    save: str | None = None
    force: bool = False
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int | None = None
    evaluation: Evaluation | None = None


def choose_device(device: str) -> str:
    """Resolve ``auto``."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def run_prune(job: Job, recipe: Recipe, on_stage: OnStage = lambda stage, done, total: None) -> dict[str, Any]:
    """Load, measure, prune, measure and save.

    Parameters
    ----------
    job : Job
    recipe : Recipe
    on_stage : callable
        See :data:`OnStage`.

    Returns
    -------
    dict
        What ``neuronrank.json`` holds: the recipe, the job, sparsity per module, perplexities, versions.

    Raises
    ------
    NeuronRankError
        Of every kind; nothing is left under the output's name then.
    """
    if job.save is not None:
        check_output(job.save, None, job.force)
    # Texts first: a missing file should not cost the time to load a model.
    text = corpus.load_text(job.dataset, "calibration") if recipe.needs_text else ""
    eval_text = corpus.load_text(job.evaluation.dataset, "evaluation") if job.evaluation else ""
    device = choose_device(job.device)
    on_stage(f"loading {job.model}", 0, 1)
    model, tokenizer, source = load_model(job.model, dtype=job.dtype, device=device)
    if job.save is not None:
        check_output(job.save, source, job.force)
    before = _measure("perplexity before", job, model, tokenizer, eval_text, on_stage)
    report = prune(
        model,
        tokenizer,
        recipe,
        text,
        batch_size=job.batch_size,
        on_progress=lambda layer, done, total: on_stage(f"pruning layer {layer}", done, total),
    ).to_dict()
    after = _measure("perplexity after", job, model, tokenizer, eval_text, on_stage)
    report["job"] = {**asdict(job), "device": device, "model_type": source.model_type}
    if before and after:
        report["perplexity"] = {"before": before.to_dict(), "after": after.to_dict()}
    if job.save is not None:
        on_stage(f"saving {job.save}", 0, 1)
        save_model(model, tokenizer, job.save, report=report, force=job.force, source=source)
    return report


def _measure(stage: str, job: Job, model: Any, tokenizer: Any, text: str, on_stage: OnStage) -> Perplexity | None:
    if job.evaluation is None:
        return None
    e = job.evaluation
    return evaluate(
        model,
        tokenizer,
        text,
        seqlen=e.seqlen,
        windows=e.windows,
        bos_mode=e.bos,
        batch_size=job.batch_size or 1,
        on_progress=partial(on_stage, stage),
    )


def run_eval(
    model: str,
    evaluation: Evaluation,
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
    batch_size: int = 1,
    on_stage: OnStage = lambda stage, done, total: None,
) -> Perplexity:
    """Load a model and measure its perplexity.

    Raises
    ------
    NeuronRankError
        If the model or the text cannot be used.
    """
    text = corpus.load_text(evaluation.dataset, "evaluation")
    on_stage(f"loading {model}", 0, 1)
    loaded, tokenizer, _ = load_model(model, dtype=dtype, device=choose_device(device))
    return evaluate(
        loaded,
        tokenizer,
        text,
        seqlen=evaluation.seqlen,
        windows=evaluation.windows,
        bos_mode=evaluation.bos,
        batch_size=batch_size,
        on_progress=partial(on_stage, "perplexity"),
    )
