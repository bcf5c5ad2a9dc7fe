"""What every run is told: model, text, device, output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neuronrank_core import Recipe
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
        As :func:`neuronrank_torch.model.open.load_model` and :func:`neuronrank_torch.text.sources.load_text` take them.
    save : str, optional
        Output folder; nothing is saved by default.
    force : bool
        Replace an existing output, and discard an unfinished run for it that is another one.
    device : str
        ``auto`` is CUDA where there is one, else the CPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Of the weights.
    batch_size : int, optional
        Sequences in a micro-batch.
    evaluation : Evaluation, optional
        Perplexity before and after; not measured by default.
    hidden_states : {"memory", "disk"}
        Where the calibration text's hidden states are kept while a run that saves goes from layer to layer.
    stats : str, optional
        Folder of statistics to prune by, instead of calibration text.
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
        """The statistics to prune by, if any; raises InputError if they cannot be read."""
        return None if self.stats is None else StatisticsFolder(self.stats)

    def calibration_text(self, recipe: Recipe) -> str:
        """The text to calibrate on, empty where none is needed; raises InputError if it cannot be read."""
        return load_text(self.dataset, "calibration") if recipe.needs_text and self.stats is None else ""
