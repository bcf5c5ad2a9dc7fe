"""Standard tasks, evaluated with lm-eval, EleutherAI's evaluation harness."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from neuronrank_core.errors import InputError, NeuronRankError, NonFiniteError, first_line
from neuronrank_torch.model.open import Dtype, load_model
from neuronrank_torch.paths import local_path
from neuronrank_torch.progress import Progress, silent


@dataclass(frozen=True)
class TasksResult:
    """Result of ``neuronrank eval --tasks``.

    Parameters
    ----------
    model : str
        The model, as it was named.
    tasks : dict of dict
        Results of lm-eval by task. Metrics are named ``metric,filter``; null stands for NaN and infinity.
    task_versions : dict
        Version of each task.
    fewshot : dict of int
        Number of solved examples in each prompt, by task.
    limit : int or None
        Number of questions of each task; null for all.
    lm_eval : str
        Version of lm-eval.
    schema : int
        Version of this format.
    """

    model: str
    tasks: dict[str, dict[str, float | str | None]]
    task_versions: dict[str, Any]
    fewshot: dict[str, int]
    limit: int | None
    lm_eval: str
    schema: int = 1


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
) -> TasksResult:
    """Load a model and evaluate it on tasks with lm-eval.

    Parameters
    ----------
    model : str
        As :func:`neuronrank_torch.model.open.load_model` takes it.
    tasks : sequence of str
        Names of tasks of lm-eval or in ``include_path``.
    include_path : str, optional
        Folder with more tasks, as YAML files for lm-eval.
    fewshot : int, optional
        Solved examples in each prompt; by default what the task says.
    limit : int, optional
        Questions of each task; all by default.
    device, dtype, batch_size, progress
        As in :class:`neuronrank_torch.runs.job.Job`; ``batch_size`` counts questions.

    Returns
    -------
    TasksResult

    Raises
    ------
    InputError
        If lm-eval is not installed, the model cannot be used, or ``include_path`` is not a folder.
    NonFiniteError
        If the model predicts NaN or Inf.
    NeuronRankError
        If lm-eval fails, for example because it does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"--tasks needs lm-eval, which cannot be imported ({error})", hint="pip install 'neuronrank[eval]'"
        ) from error
    if include_path is not None:
        folder = local_path(include_path)
        if not folder.is_dir():
            raise InputError(f"--include-path {include_path} is not a folder", hint="name the folder of the YAML files")
        include_path = str(folder)
    progress(f"loading {model}", 0, 1, "models")
    loaded, tokenizer, _ = load_model(model, dtype=dtype, device=device)
    _check_predictions(loaded)
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
    except Exception as error:  # lm-eval has no base class for its errors, and data sets come from the network.
        raise NeuronRankError(
            f"lm-eval failed on {', '.join(tasks)}: {type(error).__name__}: {first_line(error)}",
            hint="`lm-eval ls tasks` lists the names; most tasks download their data",
        ) from error
    if found is None:  # In all but the first of several processes.
        raise NeuronRankError("lm-eval gave no results", hint="run it in one process")
    return TasksResult(
        model=model,
        tasks={name: _finite(metrics) for name, metrics in found["results"].items()},
        task_versions=dict(found["versions"]),
        fewshot=dict(found["n-shot"]),
        limit=limit,
        lm_eval=version("lm-eval"),
    )


@torch.inference_mode()
def _check_predictions(model: Any) -> None:
    """Raise NonFiniteError if the model predicts NaN: lm-eval takes any answer for the most likely one then."""
    tokens = torch.arange(8, device=model.device) % model.get_input_embeddings().num_embeddings
    if not math.isfinite(model(input_ids=tokens[None]).logits.amax()):
        raise NonFiniteError("the model predicts NaN or Inf", hint="try --dtype float32, and check its weights")


def _finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics as JSON can represent them: the standard error of a single question is NaN."""
    plain = {name: getattr(value, "item", lambda value=value: value)() for name, value in metrics.items()}
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in plain.items()}
