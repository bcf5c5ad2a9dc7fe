"""A search, from the name of a model and a folder of statistics to the best recipe: what the command line calls."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from neuronrank_core import AllZeroMetricError, InputError, InvalidValueError, NonFiniteError, Recipe, __version__
from neuronrank_core.errors import add_note
from neuronrank_core.measures import NOISE, perplexity_standard_error
from neuronrank_core.methods import decided
from neuronrank_core.search_space import DEFAULT_EXPERT_METHODS, DEFAULT_METHODS, Space, canonical
from neuronrank_core.statistics.table import RESIDUAL
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.evaluation.perplexity import from_windows
from neuronrank_torch.evaluation.seen_text import NOTABLE, calibration_text, evaluation_notes, overlap
from neuronrank_torch.files.journal import JOURNAL_FORMAT
from neuronrank_torch.model.open import Dtype, load_model
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.runs.tune.importance import importances
from neuronrank_torch.runs.tune.objective import MaskedModel, output_error
from neuronrank_torch.runs.tune.study import FAILED, START, TuningStudy
from neuronrank_torch.runs.tune.tune_result import HeldOut, Protocol, Trial, TuneResult
from neuronrank_torch.text.sequences import Tokens, bos_token, evaluation_windows
from neuronrank_torch.text.sources import read_documents, text_fingerprint

#: Settings of the seed formula by importance, according to the documentation of the methods.
DOCUMENTED = ("idf_exp", "tfidf_mode", "tf_exp", "tfidf_k", "weight_exp", "q_active")
#: With the proxy, a recipe is given up if its output error exceeds that of the best recipe by this factor.
_HOPELESS = 2.0
#: Attributes of a trial: error of the output of the first layers, and the sum of -log p(token) of each window.
ERROR, NLL = "output_error", "nll"


@dataclass(frozen=True)
class TuneJob:
    """What to search, with what, and for how long.

    Parameters
    ----------
    model, stats, storage : str
        Model, folder of its statistics, and where trials are stored (an SQLite file, or the URL of a database).
    eval_dataset : str
        Text that recipes are compared on.
    eval_windows, test_windows : int, optional
        Number of windows of each text; all by default.
    seqlen : int, optional
        Tokens per window; by default as in the statistics.
    test_dataset : str, optional
        Text on which the best recipe, Wanda and the default are measured at the end.
    trials : int
        Total number of trials, including those of earlier runs and of other processes.
    methods : tuple of str
        By default those for the sparsity type, see :mod:`neuronrank_core.search_space`.
    proxy : bool
        Give up recipes early, based on the output error of the first layers.
    batch_size : int
        Windows per forward pass.
    force : bool
        Discard a different search in ``storage``.
    device, dtype : str
        As in :class:`neuronrank_torch.runs.job.Job`.
    """

    model: str
    stats: str
    storage: str
    eval_dataset: str = "builtin"
    eval_windows: int | None = 8
    seqlen: int | None = None
    test_dataset: str | None = None
    test_windows: int | None = None
    trials: int = 30
    methods: tuple[str, ...] = ()
    proxy: bool = False
    batch_size: int = 1
    force: bool = False
    device: str = "auto"
    dtype: Dtype = "auto"


def run_tune(job: TuneJob, recipe: Recipe, progress: Progress = silent) -> tuple[Recipe, TuneResult]:
    """Search for the best recipe; resumes an interrupted run of the same search.

    Parameters
    ----------
    job : TuneJob
    recipe : Recipe
        Sparsity, scope and seed. Everything else is searched, or fixed by the statistics.
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`.

    Returns
    -------
    best : Recipe
        As it was chosen, with fields at None where the default of the method applies.
    result : TuneResult

    Raises
    ------
    NeuronRankError
        If the search fails. Finished trials stay in the storage.
    """
    if recipe.structured and not recipe.removes_experts:
        raise InvalidValueError("sparsity_type", recipe.sparsity_type, "unstructured, N:M or experts")
    statistics = StatisticsFolder(job.stats)
    space = space_of(statistics, recipe, job.methods)
    if job.trials < len(space.starts()):
        allowed = f"at least {len(space.starts())}, the recipes to start from"
        raise InvalidValueError("trials", job.trials, allowed)
    read = [read_documents(name, "evaluation") if name else None for name in (job.eval_dataset, job.test_dataset)]
    progress(f"loading {job.model}", 0, 1, "models")
    model, tokenizer, source = load_model(job.model, dtype=job.dtype, device=job.device)
    texts = [documents.text(tokenizer) if documents else "" for documents in read]
    statistics.check_model(source)
    masked = MaskedModel(model, tokenizer, statistics, space.base)
    run = _TuneRun(job, space, masked, texts, source.notes, progress)
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = TuningStudy(job.storage, run.identity(source.digests()), space, recipe.seed, force=job.force)
        return run.search(study)
    finally:
        optuna.logging.set_verbosity(before)


def space_of(statistics: StatisticsFolder, recipe: Recipe, methods: tuple[str, ...]) -> Space:
    """The recipes that these statistics allow, with the sparsity, scope and seed of a recipe."""
    base = statistics.fitted(replace(recipe, **statistics.fixed))
    unstructured = base.sparsity_type == "unstructured"
    gains = statistics.table(0, {RESIDUAL}).error_gain if unstructured else None
    allocatable = gains is not None and np.isfinite(gains).any()
    methods = methods or (DEFAULT_EXPERT_METHODS if base.removes_experts else DEFAULT_METHODS)
    return Space(base, tuple(dict.fromkeys(methods)), ("uniform", "neuronrank") if allocatable else ("uniform",))


class _TuneRun:
    """A search with its inputs loaded."""

    def __init__(
        self,
        job: TuneJob,
        space: Space,
        masked: MaskedModel,
        texts: list[str],
        notes: Sequence[str],
        progress: Progress,
    ) -> None:
        self.job, self.space, self.masked, self.texts, self.progress = job, space, masked, texts, progress
        self.notes = notes
        self.statistics, self.tokenizer = masked.statistics, masked.tokenizer
        self.seqlen = job.seqlen or space.base.seqlen
        cut = partial(evaluation_windows, self.tokenizer, seqlen=self.seqlen, bos_mode=space.base.bos)
        self.windows = cut(texts[0], windows=job.eval_windows)
        self.test_windows = cut(texts[1], windows=job.test_windows) if job.test_dataset else None

    def identity(self, digests: dict[str, str]) -> dict[str, Any]:
        """Everything the trials depend on. A search is resumed only if all of it is unchanged."""
        named = ("model", "dataset", "versions")  # Names only; digests identify the model and the text.
        return {
            "model": digests,
            "statistics": {name: value for name, value in self.statistics.header.items() if name not in named},
            "validation text": text_fingerprint(self.texts[0]),
            "windows": len(self.windows),
            "seqlen": self.seqlen,
            "recipe": asdict(decided(self.space.base)),
            "methods": list(self.space.methods),
            "dtype": self.job.dtype,
            "proxy": self.job.proxy,
            "version": {"neuronrank": __version__, "journal": JOURNAL_FORMAT},
        }

    def search(self, study: TuningStudy) -> tuple[Recipe, TuneResult]:
        """Run the trials that are missing, and summarise all of them."""
        if study.done():
            finished, trials = len(study.done()), self.job.trials
            self.progress(f"resuming: {finished} of {trials} trials are finished", finished, trials, "trials")
        dense = study.study.user_attrs.get("dense")
        if dense is None:
            dense = self._perplexity(self._nll("the unpruned model", self.windows))
            study.study.set_user_attr("dense", dense)
        self.dense_output = self.masked.early_output(self.windows) if self.job.proxy else None
        try:
            exhausted = not study.run(self.job.trials, lambda trial, recipe: self._measure(study, trial, recipe))
        except BaseException as error:
            done = f"{len(study.done())} of {self.job.trials} trials"
            add_note(error, f"{done} are finished and kept; rerun the same command to resume")
            raise
        measured = study.measured()
        if not measured:
            raise InputError("no recipe could be measured", hint="try a lower --sparsity_ratio")
        notes = [*self.notes, *self._notes()]
        if exhausted:
            notes.append(f"no recipes are left to try after {len(study.done())} trials")
        missing = study.starts.keys() - {trial.user_attrs.get(START) for trial in study.done()}
        if missing:
            notes.append(f"not included, because another process is still measuring them: {'; '.join(sorted(missing))}")
        best, entries = measured[0][1], [self._entry(*one, measured[0][0]) for one in measured]
        result = TuneResult(
            model=self.job.model,
            stats=self.job.stats,
            validation=Protocol(**self._protocol(self.job.eval_dataset, self.windows)),
            dense=dense,
            best=entries[0],
            trials=tuple(sorted(entries, key=lambda one: one.number)),
            within_noise=tuple(
                one.number
                for one in entries[1:]
                if one.standard_error is not None
                and one.perplexity - entries[0].perplexity <= NOISE * one.standard_error
            ),
            given_up=sum(trial.state is TrialState.PRUNED for trial in study.done()),
            failed={str(t.number): t.user_attrs[FAILED] for t in study.done() if FAILED in t.user_attrs},
            importance=importances([(recipe, value) for _, recipe, value in measured]),
            documented_order=DOCUMENTED,
            test=self._test(best, notes),
            notes=tuple(notes),
            versions={**versions(), "optuna": optuna.__version__},
        )
        return best, result

    def _measure(self, study: TuningStudy, trial: optuna.Trial, recipe: Recipe) -> float:
        """Perplexity of a recipe; raises optuna.TrialPruned if the proxy gives it up."""
        measured, start = study.measured(), trial.user_attrs.get(START)
        best = f", best {measured[0][2]:.4f} by trial {measured[0][0].number}" if measured else ""
        stage = f"trial {trial.number}: {start or described(recipe, self.space.base)}{best}"
        self.progress(stage, len(study.done()), self.job.trials, "trials")
        with self.masked.masked(recipe):
            if self.dense_output is not None:
                error = output_error(self.masked.early_output(self.windows), self.dense_output)
                trial.set_user_attr(ERROR, error)
                if start is None and measured and error > _HOPELESS * measured[0][0].user_attrs[ERROR]:
                    raise optuna.TrialPruned
            nll = self.masked.nll(self.windows, self.job.batch_size)
        trial.set_user_attr(NLL, nll)
        return self._perplexity(nll)

    def _nll(self, what: str, windows: Tokens) -> list[float]:
        return self.masked.nll(windows, self.job.batch_size, self.progress, f"perplexity of {what}")

    def _perplexity(self, nll: list[float]) -> float:
        return from_windows(nll, self.seqlen, None).perplexity

    def _difference_error(self, nll: list[float], best: list[float]) -> float | None:
        """Standard error of the difference of two perplexities on the same windows."""
        return perplexity_standard_error(*([sum_of / (self.seqlen - 1) for sum_of in sums] for sums in (nll, best)))

    def _entry(self, trial: FrozenTrial, recipe: Recipe, perplexity: float, best: FrozenTrial) -> Trial:
        nll = [one.user_attrs[NLL] for one in (trial, best) if NLL in one.user_attrs]  # Not in those of older versions.
        error = self._difference_error(*nll) if len(nll) == 2 else None
        return Trial(trial.number, trial.user_attrs.get(START), perplexity, decided(recipe), error)

    def _test(self, best: Recipe, notes: list[str]) -> HeldOut | None:
        """Perplexities on the test text, on which no choice depends; a note for a method that has none."""
        if self.test_windows is None or self.job.test_dataset is None:
            return None
        nll = {"dense": self._nll("the unpruned model on the test text", self.test_windows)}
        others = {
            name: canonical(replace(self.space.base, method=name)) for name in (self.space.established, Recipe.method)
        }
        for name, recipe in {"best": best, **others}.items():
            try:
                with self.masked.masked(recipe):
                    nll[name] = self._nll(f"{name} on the test text", self.test_windows)
            except (AllZeroMetricError, NonFiniteError) as error:
                if name == "best":
                    raise
                notes.append(f"{name} failed on the test text: {error}")
        return HeldOut(
            **self._protocol(self.job.test_dataset, self.test_windows),
            perplexity={name: self._perplexity(sums) for name, sums in nll.items()},
            standard_error={name: self._difference_error(sums, nll["best"]) for name, sums in nll.items()},
        )

    def _protocol(self, dataset: str, windows: Tokens) -> dict[str, Any]:
        bos = None if bos_token(self.tokenizer) is None else self.space.base.bos
        return {"dataset": dataset, "windows": len(windows), "seqlen": self.seqlen, "bos": bos}

    def _notes(self) -> list[str]:
        """Warnings about the texts: a text that was used for calibration or the search measures too low."""
        calibration = calibration_text(self.statistics, self.tokenizer)
        notes = evaluation_notes(calibration, self.texts[0], self.statistics)
        if not calibration and not notes:
            notes.append("the calibration text was not found, so its overlap with the evaluation text is unknown")
        if self.texts[1]:
            same = text_fingerprint(self.texts[1]) == self.statistics.header["text_sha256"]
            if same or overlap(self.texts[1], calibration) >= NOTABLE:
                notes.append("the test text shares passages with the calibration text")
            if overlap(self.texts[1], self.texts[0]) >= NOTABLE:
                notes.append("the test text shares passages with the evaluation text")
        if self.space.base.sparsity_type == "unstructured" and len(self.space.allocations) == 1:
            notes.append("--allocate neuronrank was not tried, because the statistics have no gains of errors")
        return notes


def described(recipe: Recipe, base: Recipe) -> str:
    """A short description of a recipe: its method, and where it differs from the base."""
    chosen = {name: value for name, value in asdict(recipe).items() if value != getattr(base, name)}
    return " ".join([recipe.method, *(f"{name}={value}" for name, value in chosen.items() if name != "method")])
