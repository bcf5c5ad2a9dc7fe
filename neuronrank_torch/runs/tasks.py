"""Standard tasks, by lm-eval: EleutherAI's evaluation harness, handed a model of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from neuronrank_core.errors import InputError, NeuronRankError, first_line
from neuronrank_torch.model.device import choose_device
from neuronrank_torch.model.open import Dtype, load_model
from neuronrank_torch.progress import Progress, silent


def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    batch_size: int = 1,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Load a model and have lm-eval measure it on tasks.

    Parameters
    ----------
    model : str
        As :func:`neuronrank_torch.model.open.load_model` takes it.
    tasks : sequence of str
        Names that lm-eval knows, or that ``include_path`` adds.
    include_path : str, optional
        Folder of further tasks as lm-eval's YAML files.
    fewshot : int, optional
        Solved examples before each question; by default what the task says.
    limit : int, optional
        Questions of each task; all by default.
    device, dtype, batch_size, progress
        As in :class:`neuronrank_torch.runs.job.Job`; ``batch_size`` counts questions.

    Returns
    -------
    dict
        ``model``; ``tasks``: lm-eval's results by task, its metrics by ``metric,filter`` (not finite ones as None);
        ``task_versions``; ``fewshot``: examples used, by task; ``limit``; ``lm_eval``: its version.

    Raises
    ------
    InputError
        If lm-eval is not installed, or the model cannot be used.
    NeuronRankError
        If lm-eval fails, as on a task it does not know.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"--tasks needs lm-eval, which cannot be imported ({error})", hint="pip install 'neuronrank[eval]'"
        ) from error
    progress(f"loading {model}", 0, 1, "models")
    loaded, tokenizer, _ = load_model(model, dtype=dtype, device=choose_device(device))
    progress(f"running lm-eval on {', '.join(tasks)}", 0, 1, "runs")
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=TaskManager(include_path=include_path),
            num_fewshot=fewshot,
            limit=limit,
            batch_size=batch_size,
            log_samples=False,
        )
    except Exception as error:  # It has no common class for its errors, and data sets come from the network.
        raise NeuronRankError(
            f"lm-eval failed on {', '.join(tasks)}: {type(error).__name__}: {first_line(error)}",
            hint="`lm-eval ls tasks` lists the names; most tasks download their data",
        ) from error
    if found is None:  # What it returns on all but the first of several processes.
        raise NeuronRankError("lm-eval gave no results", hint="run it in one process")
    return {
        "model": model,
        "tasks": {name: _finite(metrics) for name, metrics in found["results"].items()},
        "task_versions": dict(found["versions"]),
        "fewshot": dict(found["n-shot"]),
        "limit": limit,
        "lm_eval": version("lm-eval"),
    }


def _finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics as JSON can hold them: the standard error of a single question is no number."""
    plain = {name: getattr(value, "item", lambda value=value: value)() for name, value in metrics.items()}
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in plain.items()}
