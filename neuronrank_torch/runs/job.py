"""Inputs and outputs of a run: model, text, device, folder."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from neuronrank_core import InputError, Recipe
from neuronrank_core.measures import Divergence
from neuronrank_core.methods import needs_text
from neuronrank_torch.calibration.hidden_states import HiddenStates
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.evaluation.divergence import compare_predictions
from neuronrank_torch.evaluation.perplexity import Perplexity, evaluate
from neuronrank_torch.evaluation.windows import Evaluated
from neuronrank_torch.files.durable import MODEL, Kind, check_output
from neuronrank_torch.model.device import choose_device
from neuronrank_torch.model.limits import check_tokens
from neuronrank_torch.model.open import Dtype
from neuronrank_torch.paths import local_path
from neuronrank_torch.text.sequences import evaluation_windows
from neuronrank_torch.text.sources import SELF, Documents, read_documents


@dataclass(frozen=True)
class Evaluation:
    """How to measure perplexity.

    Parameters
    ----------
    dataset : str
        As :func:`neuronrank_torch.text.sources.load_text` takes it.
    seqlen : int
        Tokens per window.
    windows : int, optional
        Number of windows; all by default.
    bos : {"window", "text"}
        Where a beginning-of-sequence token is added.
    """

    dataset: str = "builtin"
    seqlen: int = 512
    windows: int | None = None
    bos: Literal["window", "text"] = "window"

    def measure(self, model: Any, tokenizer: Any, text: str, **options: Any) -> Perplexity:
        """Measure a model's perplexity; options as of :func:`neuronrank_torch.evaluation.perplexity.evaluate`."""
        how: dict[str, Any] = {"seqlen": self.seqlen, "windows": self.windows, "bos_mode": self.bos}
        return evaluate(model, tokenizer, text, **how, **options)

    def check(self, model: Any, tokenizer: Any, text: str) -> None:
        """Refuse a text that is too short, or windows that a model cannot process; raises InputError."""
        how: dict[str, Any] = {"seqlen": self.seqlen, "windows": self.windows, "bos_mode": self.bos}
        check_tokens(model, evaluation_windows(tokenizer, text, **how))

    def compare(
        self, reference: Evaluated, model: Evaluated, tokenizer: Any, text: str, **options: Any
    ) -> tuple[Perplexity, Perplexity, Divergence]:
        """Measure two models; as :func:`neuronrank_torch.evaluation.divergence.compare_predictions`."""
        how: dict[str, Any] = {"seqlen": self.seqlen, "windows": self.windows, "bos_mode": self.bos}
        return compare_predictions(reference, model, (tokenizer, tokenizer), text, **how, **options)


@dataclass(frozen=True)
class Job:
    """Inputs and output of a run. The recipe says what happens in between.

    Parameters
    ----------
    model, dataset : str
        As :func:`neuronrank_torch.model.open.load_model` and :func:`neuronrank_torch.text.sources.load_text` take them;
        ``self`` is a text that the model writes.
    save : str, optional
        Output folder; nothing is saved by default.
    force : bool
        Replace an existing output, and discard an unfinished run of a different command for it.
    device : str
        ``auto`` is CUDA if available, otherwise the CPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Precision of the weights.
    batch_size : int, optional
        Sequences per micro-batch.
    evaluation : Evaluation, optional
        How to measure perplexity before and after; not measured by default.
    hidden_states : {"memory", "disk"}
        Where a run that saves stores the hidden states of the calibration text between layers.
    stats : str, optional
        Folder of statistics to prune with, instead of calibration text.
    sample : bool
        Continue a few prompts with the model before and after pruning. This loads both whole, one after the other.
    """

    model: str
    dataset: str = "builtin"
    save: str | None = None
    force: bool = False
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int | None = None
    evaluation: Evaluation | None = None
    hidden_states: HiddenStates = "memory"
    stats: str | None = None
    sample: bool = False


@dataclass(frozen=True)
class Inputs:
    """A job and its recipe, with everything read that the run needs besides the model.

    Parameters
    ----------
    job : Job
        With its device chosen.
    recipe : Recipe
        Fitted to the statistics, if there are any.
    statistics : StatisticsFolder or None
        What to prune with, instead of calibration text.
    documents, eval_documents : Documents or None
        Calibration and evaluation text; None if not needed, or if the model writes it.
    """

    job: Job
    recipe: Recipe
    statistics: StatisticsFolder | None
    documents: Documents | None
    eval_documents: Documents | None
    #: Whether the model has to write its calibration text.
    writes_text: bool

    def texts(self, tokenizer: Any) -> tuple[str, str]:
        """Calibration and evaluation text, each empty if not needed or not written yet."""

        def text(documents: Documents | None) -> str:
            return "" if documents is None else documents.text(tokenizer)

        return text(self.documents), text(self.eval_documents)


def check_apart(
    save: str, force: bool, calibration: str | None, evaluation: str | None = None, kind: Kind = MODEL
) -> Path:
    """The output folder, see :func:`check_output`; raises InputError if it contains a text, which it would replace."""
    target = check_output(save, force, kind)
    for what, spec in (("calibration", calibration), ("evaluation", evaluation)):
        if spec and (path := local_path(spec)).exists() and path.resolve().is_relative_to(target):
            raise InputError(f"{target} contains the {what} text ({spec})", hint="choose another output folder")
    return target


def read_inputs(job: Job, recipe: Recipe, ranks: Ranks = ALONE, *, compares: bool = False) -> Inputs:
    """Check the output folder, then read statistics and texts; raises InputError if one cannot be used.

    With ``compares``, recipes are compared on a part of the calibration text, which is read whatever they need.
    """
    needed = (needs_text(recipe) or compares) and job.stats is None
    if job.save is not None:
        calibration = job.dataset if needed else None
        evaluation = job.evaluation.dataset if job.evaluation else None
        ranks.from_first(partial(check_apart, job.save, job.force, calibration, evaluation))
    written = needed and job.dataset == SELF
    statistics = None if job.stats is None else StatisticsFolder(job.stats)
    recipe = recipe if statistics is None else statistics.fitted(recipe)

    def texts() -> tuple[Documents | None, Documents | None]:
        """Calibration and evaluation text."""
        documents = read_documents(job.dataset, "calibration") if needed and not written else None
        return documents, read_documents(job.evaluation.dataset, "evaluation") if job.evaluation else None

    documents = ranks.from_first(texts)
    return Inputs(replace(job, device=choose_device(job.device)), recipe, statistics, *documents, written)
