"""The inputs of a page: the saved and the original model, statistics and text, opened when they are first used."""

from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from neuronrank_core import InputError, InvalidValueError, Recipe
from neuronrank_core.methods import check_recipe, method_of, mode, requires
from neuronrank_core.statistics.table import SAMPLE
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.evaluation.generation import PROMPTS, check_prompts
from neuronrank_torch.files.json import read_json
from neuronrank_torch.model.device import check_device
from neuronrank_torch.model.open import Dtype, open_model
from neuronrank_torch.model.source import ModelSource
from neuronrank_torch.model.streaming import StreamedModel
from neuronrank_torch.paths import local_path
from neuronrank_torch.runs.page.passages import Passages
from neuronrank_torch.runs.prune_result import PruneResult
from neuronrank_torch.saving.model_writer import REPORT_NAME
from neuronrank_torch.schema import from_json
from neuronrank_torch.text.sequences import calibration_sequences
from neuronrank_torch.text.sources import load_text, text_fingerprint


class UnavailableError(Exception):
    """An input of a section is missing. The message says which flag provides it."""


@dataclass(frozen=True)
class InsightJob:
    """The inputs and the size of a page.

    Parameters
    ----------
    folder : str
        Output of ``neuronrank prune --save``.
    stats : str, optional
        Folder of statistics of the original model.
    model : str, optional
        The original model; by default the one that was pruned.
    dataset : str, optional
        The text of the statistics; by default the one that they name.
    tfidf : dict
        Fields of the recipe that apply when statistics are read, if they are not those of the run.
    layers : int
        Number of layers to show in detail.
    prompts : tuple of str
        Prompts to continue.
    new_tokens : int
        Tokens to generate for each prompt; 0 for none.
    eval_windows : int, optional
        Windows on which predictions are compared with those of the original model; 0 for none, by default as in the
        run.
    device, dtype
        As in :class:`neuronrank_torch.runs.job.Job`.
    """

    folder: str
    stats: str | None = None
    model: str | None = None
    dataset: str | None = None
    tfidf: dict[str, Any] = field(default_factory=dict)
    layers: int = 6
    prompts: tuple[str, ...] = PROMPTS
    new_tokens: int = 40
    eval_windows: int | None = None
    device: str = "auto"
    dtype: Dtype = "auto"


class Sources:
    """The inputs of a page.

    Parameters
    ----------
    job : InsightJob

    Raises
    ------
    InputError
        On access, if a given input cannot be used.
    UnavailableError
        On access, if an input was not given or cannot be found.
    """

    def __init__(self, job: InsightJob) -> None:
        self.job = job
        self.device = check_device(job.device)

    def check(self) -> None:
        """Open what is read later, before the long work; raises InputError if it cannot be used."""
        if self.job.stats is not None:
            with suppress(UnavailableError):
                self.reading  # noqa: B018 (checks the settings)
        if self.job.new_tokens:
            check_prompts(self.saved[0].model, self.saved[1], self.job.prompts, self.job.new_tokens)

    @cached_property
    def result(self) -> PruneResult:
        """``neuronrank.json`` of the saved model."""
        file = local_path(self.job.folder) / REPORT_NAME
        if not file.is_file():
            raise InputError(
                f"{self.job.folder} has no {REPORT_NAME}", hint="name a folder that `neuronrank prune --save` wrote"
            )
        result = from_json(PruneResult, read_json(file, "prune again"), file, "prune again")
        try:
            check_recipe(result.recipe)
        except InvalidValueError as error:
            raise InputError(f"cannot read {file}: recipe.{error}", hint="prune again") from error
        return result

    @cached_property
    def reading(self) -> Recipe:
        """The recipe for reading the statistics: in the mode of the run if it groups text, otherwise by topics."""
        header, run = self.statistics.header, self.result.recipe
        tokens = len(header["documents"]) * min(header["seqlen"], header["tokens_per_document"])
        groups_text = SAMPLE in requires(run) or (method_of(run).mode is not None and not self.statistics.experts)
        values = {
            "tfidf_mode": mode(run) if groups_text else "topic",
            "tfidf_k": min(run.tfidf_k, tokens),
            "q_active": run.q_active,
            **({"signal": "product"} if self.statistics.experts else {}),
            **self.job.tfidf,
        }
        same = {"nsamples": len(header["documents"]), "seqlen": header["seqlen"], **self.statistics.fixed}
        return Recipe(method="neuronrank_tfidf", seed=run.seed, **(same | values))

    @cached_property
    def saved(self) -> tuple[StreamedModel, Any, ModelSource]:
        """The saved model, its tokenizer and its source."""
        return open_model(self.job.folder, dtype=self.job.dtype, device=self.device)

    @property
    def dense_name(self) -> str:
        """The name of the original model."""
        return self.job.model or self.result.job.model

    @cached_property
    def dense(self) -> tuple[StreamedModel, Any, ModelSource]:
        """The original model, its tokenizer and its source."""
        try:
            return open_model(self.dense_name, dtype=self.job.dtype, device=self.device)
        except InputError as error:
            if self.job.model is not None:
                raise
            raise UnavailableError(f"Provide the original model with --model: {error}.") from error

    @cached_property
    def statistics(self) -> StatisticsFolder:
        """The statistics, which have to be of this model."""
        if self.job.stats is None:
            raise UnavailableError("Provide --stats, a folder written by `neuronrank collect` for the original model.")
        if self.result.removed_layers:
            raise UnavailableError("Layers were removed, and statistics are compared layer by layer.")
        folder = StatisticsFolder(self.job.stats)
        folder.check_layers(len(self.saved[0].decoder.layers))
        with suppress(UnavailableError):
            folder.check_model(self.dense[2])
        return folder

    @cached_property
    def passages(self) -> Passages:
        """The calibration sequences of the statistics."""
        header = self.statistics.header
        name = self.job.dataset or self.statistics.dataset
        try:
            text = load_text(name, "calibration", self.saved[1])
        except InputError as error:
            if self.job.dataset is not None:
                raise
            raise UnavailableError(f"Provide the calibration text with --dataset: {error}.") from error
        if text_fingerprint(text) != header["text_sha256"]:
            raise UnavailableError(
                f"{name} is not the text that the statistics were collected on (its SHA-256 differs): "
                "provide that text with --dataset."
            )
        tokenizer = self.saved[1]
        drawn = Recipe(**{name: header[name] for name in ("nsamples", "seqlen", "seed", "bos")})
        return Passages(calibration_sequences(tokenizer, drawn, text).numpy(), tokenizer)
