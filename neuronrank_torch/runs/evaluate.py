"""The perplexity of a model, from its name: what ``neuronrank eval`` calls."""

from dataclasses import dataclass
from typing import Any

from neuronrank_core import MissingStatisticsError, UnsupportedModelError
from neuronrank_torch.distributed.process_group import launched
from neuronrank_torch.evaluation.perplexity import Perplexity
from neuronrank_torch.model.open import Dtype, load_model, open_model
from neuronrank_torch.model.source import ModelSource
from neuronrank_torch.model.streaming import Resident
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.runs.job import Evaluation
from neuronrank_torch.text.sources import load_text


@dataclass(frozen=True)
class EvalResult(Perplexity):
    """Result of ``neuronrank eval``.

    Parameters
    ----------
    model : str
        The model, as it was named.
    dataset : str
        The text, as it was named.
    notes : tuple of str
        Warnings.
    schema : int
        Version of this format.
    """

    model: str
    dataset: str
    notes: tuple[str, ...] = ()
    schema: int = 1


def run_eval(
    model: str,
    evaluation: Evaluation,
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
    batch_size: int = 1,
    progress: Progress = silent,
) -> EvalResult:
    """Load a model and measure its perplexity; see :func:`measure`."""
    options: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": batch_size, "progress": progress}
    measured, source = _measure(model, evaluation, **options)
    return EvalResult(**vars(measured), model=model, dataset=evaluation.dataset, notes=source.notes)


def measure(model: str, evaluation: Evaluation, **options: Any) -> Perplexity:
    """Load a model and measure its perplexity. Processes started by torchrun share the windows.

    Raises
    ------
    NeuronRankError
        If the model or the text cannot be used.
    """
    return _measure(model, evaluation, **options)[0]


def _measure(
    model: str,
    evaluation: Evaluation,
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
    batch_size: int = 1,
    progress: Progress = silent,
    stage: str = "perplexity",
) -> tuple[Perplexity, ModelSource]:
    with launched() as ranks:
        text = ranks.from_first(lambda: load_text(evaluation.dataset, "evaluation"))
        progress(f"loading {model}", 0, 1, "models")
        resident: Resident | None = None
        try:
            streamed, tokenizer, source = open_model(model, dtype=dtype, device=device)
            loaded, resident = streamed.model, streamed.resident
        except (MissingStatisticsError, UnsupportedModelError):  # Perplexity does not need a known layout.
            loaded, tokenizer, source = load_model(model, dtype=dtype, device=device)
        how = {"batch_size": batch_size, "progress": progress, "stage": stage, "resident": resident, "ranks": ranks}
        return evaluation.measure(loaded, tokenizer, text, **how), source
