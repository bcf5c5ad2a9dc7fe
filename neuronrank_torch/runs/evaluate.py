"""The perplexity of a model, from its name, alone or beside a reference: what ``neuronrank eval`` calls."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neuronrank_core import MissingStatisticsError, UnsupportedModelError
from neuronrank_core.measures import Divergence
from neuronrank_torch.distributed.process_group import launched
from neuronrank_torch.evaluation.divergence import IncomparableError, compare_predictions
from neuronrank_torch.evaluation.perplexity import Perplexity
from neuronrank_torch.evaluation.windows import Evaluated
from neuronrank_torch.model.open import Dtype, load_model, open_model
from neuronrank_torch.model.source import ModelSource
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.runs.job import Evaluation
from neuronrank_torch.text.sources import read_documents


@dataclass(frozen=True, kw_only=True)
class Reference(Divergence):
    """The reference model, and how far the predictions of the evaluated model are from its own.

    Parameters
    ----------
    model : str
        The reference, as it was named.
    perplexity : Perplexity
        Of the reference, on the same windows.
    """

    model: str
    perplexity: Perplexity


@dataclass(frozen=True, kw_only=True)
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
    reference : Reference or None
        Null without ``--reference``.
    schema : int
        Version of this format.
    """

    model: str
    dataset: str
    notes: tuple[str, ...] = ()
    reference: Reference | None = None
    schema: int = 1


def run_eval(
    model: str,
    evaluation: Evaluation,
    *,
    reference: str | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    batch_size: int = 1,
    progress: Progress = silent,
) -> EvalResult:
    """Load a model and measure its perplexity; with a reference, also how far its predictions are from that model's.

    See :func:`measure` and :func:`measure_pair`.
    """
    how: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": batch_size, "progress": progress}
    beside = None
    if reference is None:
        measured, notes = _measure(model, evaluation, **how)
    else:
        dense, measured, divergence, notes = _measure_pair(reference, model, evaluation, **how)
        beside = Reference(**asdict(divergence), model=reference, perplexity=dense)
    return EvalResult(**vars(measured), model=model, dataset=evaluation.dataset, notes=notes, reference=beside)


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
) -> tuple[Perplexity, tuple[str, ...]]:
    with launched() as ranks:
        documents = ranks.from_first(lambda: read_documents(evaluation.dataset, "evaluation"))
        opened, tokenizer, source = _open(model, stage, device, dtype, progress)
        how = {"batch_size": batch_size, "progress": progress, "stage": stage, "ranks": ranks}
        text = documents.text(tokenizer)
        return evaluation.measure(opened.model, tokenizer, text, resident=opened.resident, **how), source.notes


def measure_pair(
    reference: str, model: str, evaluation: Evaluation, **options: Any
) -> tuple[Perplexity, Perplexity, Divergence]:
    """Load two models; see :func:`neuronrank_torch.evaluation.divergence.compare_predictions`.

    Processes started by torchrun share the windows.

    Raises
    ------
    NeuronRankError
        If a model or the text cannot be used, or the models do not predict the same tokens.
    """
    return _measure_pair(reference, model, evaluation, **options)[:3]


def _measure_pair(
    reference: str,
    model: str,
    evaluation: Evaluation,
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
    batch_size: int = 1,
    progress: Progress = silent,
) -> tuple[Perplexity, Perplexity, Divergence, tuple[str, ...]]:
    with launched() as ranks:
        documents = ranks.from_first(lambda: read_documents(evaluation.dataset, "evaluation"))
        opened = [_open(name, f"perplexity of {name}", device, dtype, progress) for name in (reference, model)]
        (dense, own), tokenizers, sources = zip(*opened, strict=True)
        cut: dict[str, Any] = {"seqlen": evaluation.seqlen, "windows": evaluation.windows, "bos_mode": evaluation.bos}
        how: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "ranks": ranks}
        text = documents.text(tokenizers[0])
        measured = compare_predictions(dense, own, tokenizers, text, **cut, **how)
        return (*measured, tuple(note for source in sources for note in source.notes))


def measure_both(
    models: tuple[str, str], evaluation: Evaluation, **how: Any
) -> tuple[Sequence[Perplexity], Divergence | None, list[str]]:
    """Perplexity of two models, and the divergence of the second from the first, or a note why there is none.

    ``how`` is as of :func:`measure_pair`.
    """
    try:
        first, second, divergence = measure_pair(*models, evaluation, **how)
    except IncomparableError as error:
        alone = [measure(name, evaluation, **how, stage=f"perplexity of {name}") for name in models]
        return alone, None, [str(error)]
    return (first, second), divergence, []


def _open(name: str, stage: str, device: str, dtype: Dtype, progress: Progress) -> tuple[Evaluated, Any, ModelSource]:
    """A model that is streamed if possible, and its tokenizer."""
    progress(f"loading {name}", 0, 1, "models")
    try:
        streamed, tokenizer, source = open_model(name, dtype=dtype, device=device)
        return Evaluated(streamed.model, streamed.resident, stage), tokenizer, source
    except (MissingStatisticsError, UnsupportedModelError):  # Perplexity does not need a known layout.
        loaded, tokenizer, source = load_model(name, dtype=dtype, device=device)
        return Evaluated(loaded, stage=stage), tokenizer, source
