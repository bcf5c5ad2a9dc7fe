"""A whole run from a model's name to a saved folder: what ``neuronrank prune`` calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from neuronrank_core import Recipe
from neuronrank_core.methods import decided
from neuronrank_torch.distributed.process_group import launched
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.evaluation.windows import Evaluated
from neuronrank_torch.files.durable import check_output
from neuronrank_torch.files.journal import JOURNAL_FORMAT
from neuronrank_torch.model.open import load_model, open_model
from neuronrank_torch.model.source import ModelSource
from neuronrank_torch.model.streaming import StreamedModel
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.model.tensor_files import shards, stored_dtype
from neuronrank_torch.model.weights import LoadedWeights
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.prune import prune
from neuronrank_torch.pruning.result import Report, versions
from neuronrank_torch.pruning.scope import planned_layers
from neuronrank_torch.pruning.sparsity_types import sparsity_type_of
from neuronrank_torch.pruning.store import LayerStore
from neuronrank_torch.pruning.whole_layers import FEWER_LAYERS
from neuronrank_torch.runs.card import model_cards
from neuronrank_torch.runs.choice import Choice, Measured, compare_recipes
from neuronrank_torch.runs.early_notes import early_notes
from neuronrank_torch.runs.job import Inputs, Job, read_inputs
from neuronrank_torch.runs.own_text import write_text
from neuronrank_torch.runs.prune_result import JobRecord, ModelSize, PerplexityChange, PruneResult
from neuronrank_torch.saving.model_writer import ModelWriter
from neuronrank_torch.saving.receiver import Receiver
from neuronrank_torch.schema import to_json
from neuronrank_torch.text.sources import SELF, Documents, text_fingerprint

#: Name of the measurement of the pruned model in ``progress``.
_AFTER = "perplexity after pruning"


def run_prune(
    job: Job,
    recipe: Recipe,
    progress: Progress = silent,
    candidates: Mapping[str, Recipe] | None = None,
    warn: Callable[[str], object] = lambda note: None,
    command: str = "",
) -> PruneResult:
    """Load a model, prune it, compare its perplexity and predictions with those before, and save it.

    A run that saves reads, prunes and writes one layer at a time, and resumes an interrupted run of the same command.
    A run that does not save, or that removes layers, loads the whole model. Processes started by torchrun share the
    texts; only the first reads and writes files.

    Parameters
    ----------
    job : Job
    recipe : Recipe
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`.
    candidates : dict of Recipe, optional
        From :func:`neuronrank_core.effort.candidates`: the one that is best on held-out calibration text is used in
        place of ``recipe``. They differ in how weights are chosen and updated, not in what is pruned.
    warn : callable
        Called with those notes of the result that are known before the work begins.
    command : str
        The command that repeats the run, for the model card.

    Returns
    -------
    PruneResult
        The content of ``neuronrank.json``.

    Raises
    ------
    NeuronRankError
        If the run fails. The output folder is then not created or changed.
    """
    with launched() as ranks:
        # First, so that a missing file is reported before the model is loaded.
        inputs = read_inputs(job, recipe, ranks)
        progress(f"loading {job.model}", 0, 1, "models")
        loaded = job.save is None or recipe.removes_layers
        load: Callable[..., tuple[Any, Any, ModelSource]] = load_model if loaded else open_model
        model, tokenizer, source = load(job.model, dtype=job.dtype, device=inputs.job.device)
        text, eval_text = inputs.texts(tokenizer)
        whole = model if loaded else model.model
        run = _Run(
            **vars(inputs),
            text=text,
            eval_text=eval_text,
            tokenizer=tokenizer,
            source=source,
            progress=progress,
            ranks=ranks,
            candidates=candidates or {},
            command=command,
            dense=ModelSize.of(source, sum(p.numel() for p in whole.parameters())),
        )
        run = replace(run, early=run.check(whole))
        for note in run.early:
            warn(note)
        if loaded:
            return run.with_text(ranks.from_first, model).in_memory(model)
        assert job.save is not None
        with run.staging(model, job.save) as staging:
            return run.with_text(staging.own_text).streamed(model, staging)


@dataclass(frozen=True)
class _Run(Inputs):
    """A job with its inputs and its model loaded."""

    text: str
    eval_text: str
    tokenizer: Any
    source: ModelSource
    progress: Progress
    ranks: Ranks
    candidates: Mapping[str, Recipe]
    command: str
    dense: ModelSize
    early: Sequence[str] = ()

    def identity(self) -> dict[str, Any]:
        """Everything the result depends on. An unfinished run is resumed only if all of it is unchanged."""
        return {
            **asdict(decided(self.recipe)),
            **{name: getattr(self.job, name) for name in ("device", "dtype", "batch_size")},
            "candidates": {name: asdict(decided(recipe)) for name, recipe in self.candidates.items()},
            "model": str(self.source.path),
            "file": self.source.fingerprint(),
            "statistics": self.statistics and self.statistics.header,
            "calibration text": SELF if self.writes_text else text_fingerprint(self.text),
            "evaluation": self.job.evaluation and asdict(self.job.evaluation),
            "evaluation text": text_fingerprint(self.eval_text),
            "version of": {**versions(), "journal": JOURNAL_FORMAT},
        }

    def target(self, save: str) -> Path:
        """The output folder, which must not exist."""
        return self.ranks.from_first(
            partial(check_output, save, self.job.force, source=self.source.path, label=self.source.spec)
        )

    def staging(self, model: StreamedModel, save: str) -> ModelWriter | Receiver:
        """The folder that collects the result, as this rank sees it."""
        target = self.target(save)
        dense, hidden_states = self.recipe.propagate == "dense", self.job.hidden_states
        options: dict[str, Any] = {"propagate_dense": dense, "hidden_states": hidden_states, "ranks": self.ranks}
        if self.ranks.first:
            options |= {"fewer_experts": self.recipe.removes_experts}
            return ModelWriter(target, model, self.identity(), force=self.job.force, **options)
        return Receiver(target, model, **options)

    def check(self, model: Any) -> list[str]:
        """Refuse, before anything expensive, a model that cannot be pruned, other statistics, or too short a text.

        Returns
        -------
        list of str
            Notes for the user on what was asked.
        """
        if self.statistics is not None:
            self.statistics.check_model(self.source)
        planned_layers(model, self.recipe)
        if self.job.evaluation:
            self.job.evaluation.check(model, self.tokenizer, self.eval_text)
        return early_notes(self, self.text, self.eval_text, self.tokenizer, find_decoder(model))

    def in_memory(self, model: Any) -> PruneResult:
        """Prune a loaded model, and save it if the job says so."""
        if self.job.save is not None:
            self.target(self.job.save)
        recipe, choice = self._choose(lambda name, measure: measure())
        report = self._prune(model, recipe)
        result = self._result(report, self._measure(Evaluated(model, stage=_AFTER)), choice)
        if self.job.save is None:
            return result
        streamed = StreamedModel(model, LoadedWeights(model), model.device)
        with self.staging(streamed, self.job.save) as staging:
            for unit in range(len(streamed.decoder.layers)):
                with streamed.resident(unit):
                    staging.keep(unit)
            return self._save(result, staging)

    def with_text(self, own_text: Callable[[Callable[[], list[str]]], list[str]], model: Any = None) -> "_Run":
        """The same run, with its calibration text, if the model has to write it: ``model``, or one that is loaded."""
        if not self.writes_text:
            return self
        write = partial(write_text, self.job, self.recipe, self.progress, model, self.tokenizer)
        return replace(self, text=Documents(SELF, tuple(own_text(write))).text())

    def streamed(self, model: StreamedModel, staging: ModelWriter | Receiver) -> PruneResult:
        """Prune a streamed model and save it."""
        layers = len(model.decoder.layers)
        done = min(len(staging.units_done()), layers)
        if done:
            self.progress(f"resuming: {done} of {layers} layers are finished", done, layers, "layers")
        recipe, choice = self._choose(staging.measured)
        report = self._prune(model.model, recipe, staging)
        change = self._measure(Evaluated(model.model, staging.pruned, _AFTER))
        return self._save(self._result(report, change, choice), staging)

    def _save(self, result: PruneResult, staging: ModelWriter | Receiver) -> PruneResult:
        """Complete the output, with its size in the result and with its card."""
        self.progress(f"saving {self.job.save}", 0, 1, "folders")
        folder = staging.complete(self.tokenizer)
        result = replace(result, notes=(*result.notes, *staging.notes()))
        if folder is not None:
            saved = replace(self.source, kind="folder", path=folder, dtype=stored_dtype(shards(folder)))
            result = replace(result, output=ModelSize.of(saved, result.total.parameters))
        cards, notes = model_cards(result, self.source, self.command)
        result = replace(result, notes=(*result.notes, *notes))
        staging.finish(to_json(result), cards)
        return result

    def _choose(self, measured: Measured) -> tuple[Recipe, Choice | None]:
        """The recipe to prune by: the best of the candidates, if there are any."""
        if not self.candidates:
            return self.recipe, None
        how: dict[str, Any] = {"batch_size": self.job.batch_size, "progress": self.progress, "ranks": self.ranks}
        choice = compare_recipes(self._reopen, self.tokenizer, self.candidates, self.text, measured, **how)
        return self.candidates[choice.chosen], choice

    def _reopen(self) -> StreamedModel:
        """The model once more, with its original weights."""
        return open_model(self.job.model, dtype=self.job.dtype, device=self.job.device)[0]

    def _prune(self, model: Any, recipe: Recipe, store: LayerStore | None = None) -> Report:
        return prune(
            model,
            self.tokenizer,
            recipe,
            self.text,
            batch_size=self.job.batch_size,
            progress=self.progress,
            store=store,
            statistics=self.statistics,
            ranks=self.ranks,
        )

    def _measure(self, pruned: Evaluated) -> PerplexityChange | None:
        """Measure the pruned model beside the original one, whose layers are read once more."""
        if self.job.evaluation is None:
            return None
        dense = self._reopen()
        how: dict[str, Any] = {"batch_size": self.job.batch_size or 1, "progress": self.progress, "ranks": self.ranks}
        reference = Evaluated(dense.model, dense.resident, "perplexity before pruning")
        return PerplexityChange(*self.job.evaluation.compare(reference, pruned, self.tokenizer, self.eval_text, **how))

    def _result(self, report: Report, change: PerplexityChange | None, choice: Choice | None) -> PruneResult:
        notes = (*self.early, *self.source.notes, *report.notes)
        job = JobRecord(**vars(self.job), model_type=self.source.model_type, processes=self.ranks.size)
        recipe = report.recipe
        faster = FEWER_LAYERS if recipe.removes_layers else sparsity_type_of(recipe).speed(recipe)
        about: dict[str, Any] = {"source": self.dense, "faster": faster}
        return PruneResult(**{**vars(report), "notes": notes}, job=job, perplexity=change, choice=choice, **about)
