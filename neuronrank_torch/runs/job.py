"""Inputs and outputs of a run: model, text, device, folder."""

from dataclasses import dataclass
from typing import Literal

from neuronrank_core import Recipe
from neuronrank_core.methods import needs_text
from neuronrank_torch.calibration.hidden_states import HiddenStates
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.model.open import Dtype
from neuronrank_torch.text.sources import load_text


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


@dataclass(frozen=True)
class Job:
    """Inputs and output of a run. The recipe says what happens in between.

    Parameters
    ----------
    model, dataset : str
        As :func:`neuronrank_torch.model.open.load_model` and :func:`neuronrank_torch.text.sources.load_text` take them.
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

    def statistics(self) -> StatisticsFolder | None:
        """The statistics to prune with, if any; raises InputError if they cannot be read."""
        return None if self.stats is None else StatisticsFolder(self.stats)

    def calibration_text(self, recipe: Recipe) -> str:
        """The calibration text, empty if none is needed; raises InputError if it cannot be read."""
        return load_text(self.dataset, "calibration") if needs_text(recipe) and self.stats is None else ""
