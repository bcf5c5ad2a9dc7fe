"""A whole run from a model's name to a saved folder: what ``neuronrank prune`` calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from neuronrank_core import Recipe
from neuronrank_core.methods import decided
from neuronrank_core.mixes import Target
from neuronrank_torch.distributed.process_group import launched
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.evaluation.generation import PROMPTS, SAMPLE_TOKENS, check_prompts
from neuronrank_torch.evaluation.windows import Evaluated
from neuronrank_torch.files.durable import check_output
from neuronrank_torch.files.journal import JOURNAL_FORMAT
from neuronrank_torch.model.open import load_model, open_model
from neuronrank_torch.model.source import ModelSource
from neuronrank_torch.model.streaming import StreamedModel
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.model.tensor_files import shards, stored_dtype
from neuronrank_torch.model.weights import LoadedWeights, WeightSource
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.passes import prune_in_passes
from neuronrank_torch.pruning.result import Report, versions
from neuronrank_torch.pruning.scope import planned_layers, speed
from neuronrank_torch.pruning.store import InMemory, LayerStore, Measured, always_measured
from neuronrank_torch.runs.card import model_cards
from neuronrank_torch.runs.choice import Choice, compare_recipes
from neuronrank_torch.runs.collapse import collapse_notes
from neuronrank_torch.runs.early_notes import early_notes
from neuronrank_torch.runs.job import Inputs, Job, read_inputs
from neuronrank_torch.runs.own_text import write_text
from neuronrank_torch.runs.prune_result import JobRecord, ModelSize, PerplexityChange, PruneResult
from neuronrank_torch.runs.samples import write_samples
from neuronrank_torch.runs.smaller import Candidates, check_whole, checked_size, choose_passes
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
    target: Target | None = None,
) -> PruneResult:
    """Load a model, prune it, compare its perplexity and predictions with those before, and save it.

    A run that saves reads, prunes and writes one layer at a time, and resumes an interrupted run of the same command.
    A run that does not save, that removes layers, or that has a target, loads the whole model; if it saves, it uses the
    measurements of an interrupted one. Processes started by torchrun share the texts; only the first reads and writes
    files.

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
    target : Target, optional
        A size or a loss. What is removed to reach it is chosen on held-out calibration text; ``recipe`` says how.

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
        inputs = read_inputs(job, recipe, ranks, compares=bool(candidates) or target is not None)
        progress(f"loading {job.model}", 0, 1, "models")
        unsaved: list[str] = []
        layout = None
        how: dict[str, Any] = {"dtype": job.dtype, "device": inputs.job.device}
        loaded = job.save is None or recipe.removes_layers or target is not None
        reopen = _reopener(job.model, how)
        if target is not None or recipe.removes_layers:
            ranks.require_one(f"--sparsity_type {recipe.sparsity_type}" if target is None else target.flag)
            unsaved, layout = check_whole(reopen())
        load: Callable[..., tuple[Any, Any, ModelSource]] = load_model if loaded else open_model
        model, tokenizer, source = load(job.model, **how)
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
            sized=None if target is None else Candidates.of(whole, target, recipe),
            dense=ModelSize.of(source, sum(p.numel() for p in whole.parameters())),
            reopen=reopen if loaded else model.reopener(),
            layout=layout,
        )
        run = replace(run, early=[*unsaved, *run.check(whole)])
        for note in run.early:
            warn(note)
        if job.save is None:
            return run.with_text(ranks.from_first, model).in_memory(model)
        with run.staging(None if loaded else model, job.save) as staging:
            if isinstance(staging, ModelWriter) and loaded:
                return run.with_text(staging.own_text, model).in_memory(model, staging)
            return run.with_text(staging.own_text).streamed(model, staging)


def _reopener(spec: str, how: dict[str, Any]) -> Callable[[], StreamedModel]:
    """A function that opens a model, from its files only the first time."""

    @cache
    def reopener() -> Callable[[], StreamedModel]:
        model = open_model(spec, **how)[0]
        model.release()  # It stays as long as what its weights are read from.
        return model.reopener()

    return lambda: reopener()()


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
    reopen: Callable[[], StreamedModel]
    sized: Candidates | None = None
    early: Sequence[str] = ()
    layout: WeightSource | None = None

    def identity(self) -> dict[str, Any]:
        """Everything the result depends on. An unfinished run is resumed only if all of it is unchanged."""
        return {
            **asdict(decided(self.recipe)),
            **{name: getattr(self.job, name) for name in ("device", "dtype", "batch_size")},
            "target": self.sized and asdict(self.sized.target),
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

    def staging(self, model: StreamedModel | None, save: str) -> ModelWriter | Receiver:
        """The folder that collects the result, as this rank sees it; without a model that is pruned in memory."""
        target = self.target(save)
        dense, hidden_states = self.recipe.propagate == "dense", self.job.hidden_states
        options: dict[str, Any] = {"propagate_dense": dense, "hidden_states": hidden_states, "ranks": self.ranks}
        if self.ranks.first:
            options |= {"force": self.job.force, "smaller": self.recipe.structured}
            return ModelWriter(target, model, self.identity(), **options)
        assert model is not None
        return Receiver(target, model, **options)

    def check(self, model: Any) -> list[str]:
        """Notes for the user; refuses, early, a model that cannot be pruned, other statistics, or too short a text."""
        if self.statistics is not None:
            self.statistics.check_model(self.source)
        if self.sized is None:
            planned_layers(model, self.recipe)
        if self.job.sample:
            check_prompts(model, self.tokenizer, PROMPTS, SAMPLE_TOKENS)
        if self.job.evaluation:
            self.job.evaluation.check(model, self.tokenizer, self.eval_text)
        return early_notes(self, self.text, self.eval_text, self.tokenizer, find_decoder(model))

    def in_memory(self, model: Any, staging: ModelWriter | None = None) -> PruneResult:
        """Prune a loaded model, and save it if there is a folder for it."""
        measured = always_measured if staging is None else staging.measured
        if staging is not None and (done := staging.compared()):
            self.progress(f"resuming: measurements of candidates are kept ({done})", 0, 1, "models")
        recipes, choice = self._choose(measured, model)
        report = self._prune(model, recipes, InMemory(measured))
        choice = choice and checked_size(choice, model, self.sized)
        result = self._result(report, Evaluated(model, stage=_AFTER), choice)
        if staging is None:
            return self._sampled(result, model)
        streamed = StreamedModel(model, LoadedWeights(model, self.layout), model.device)
        staging.set_model(streamed)
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
        recipes, choice = self._choose(staging.measured)
        report = self._prune(model.model, recipes, staging)
        return self._save(self._result(report, Evaluated(model.model, staging.pruned, _AFTER), choice), staging)

    def _save(self, result: PruneResult, staging: ModelWriter | Receiver) -> PruneResult:
        """Complete the output, with its size in the result and with its card."""
        self.progress(f"saving {self.job.save}", 0, 1, "folders")
        folder = staging.complete(self.tokenizer)
        result = replace(result, notes=(*result.notes, *staging.notes()))
        if folder is not None:
            saved = replace(self.source, kind="folder", path=folder, dtype=stored_dtype(shards(folder)))
            result = replace(result, output=ModelSize.of(saved, result.total.parameters))
            result = self._sampled(result, folder)
        cards, notes = model_cards(result, self.source, self.command)
        result = replace(result, notes=(*result.notes, *notes))
        staging.finish(to_json(result), cards)
        return result

    def _sampled(self, result: PruneResult, pruned: Any) -> PruneResult:
        """The result, with samples if the job asks for them."""
        asked = self.job.sample and self.ranks.first
        return (
            replace(result, samples=write_samples(self.job, self.tokenizer, pruned, self.progress)) if asked else result
        )

    def _choose(self, measured: Measured, model: Any = None) -> tuple[list[Recipe], Choice | None]:
        """The recipes to prune by, one after another: the best of the candidates, or what reaches the target."""
        how: dict[str, Any] = {"batch_size": self.job.batch_size, "progress": self.progress}
        if self.sized is not None:
            return choose_passes(model, self.tokenizer, self.sized, self.text, measured, **how)
        if not self.candidates:
            return [self.recipe], None
        how["ranks"] = self.ranks
        choice = compare_recipes(self.reopen, self.tokenizer, self.candidates, self.text, measured, **how)
        return [self.candidates[choice.chosen]], choice

    def _prune(self, model: Any, recipes: Sequence[Recipe], store: LayerStore | None = None) -> Report:
        return prune_in_passes(
            model,
            self.tokenizer,
            recipes,
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
        dense = self.reopen()
        how: dict[str, Any] = {"batch_size": self.job.batch_size or 1, "progress": self.progress, "ranks": self.ranks}
        reference = Evaluated(dense.model, dense.resident, "perplexity before pruning")
        return PerplexityChange(*self.job.evaluation.compare(reference, pruned, self.tokenizer, self.eval_text, **how))

    def _result(self, report: Report, pruned: Evaluated, choice: Choice | None) -> PruneResult:
        change = self._measure(pruned)
        about: dict[str, Any] = {"progress": self.progress, "ranks": self.ranks}
        collapsed = collapse_notes(self.reopen, pruned, self.tokenizer, report.recipe, self.text, change, **about)
        notes = (*self.early, *self.source.notes, *report.notes, *collapsed)
        job = JobRecord(**vars(self.job), model_type=self.source.model_type, processes=self.ranks.size)
        about = {**vars(report), "notes": notes, "job": job, "source": self.dense, "faster": speed(report.recipe)}
        return PruneResult(**about, perplexity=change, choice=choice)
