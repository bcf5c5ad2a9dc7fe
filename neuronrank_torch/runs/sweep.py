"""Perplexity at every ratio, with every method and update: what ``neuronrank sweep`` calls."""

import copy
import itertools
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import Timeout

from neuronrank_core import AllZeroMetricError, InputError, NonFiniteError, Recipe
from neuronrank_core.errors import NeuronRankError, add_note
from neuronrank_core.methods import check_recipe, needs_text
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.distributed.process_group import launched
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.evaluation.perplexity import Perplexity
from neuronrank_torch.evaluation.seen_text import calibration_text, evaluation_notes
from neuronrank_torch.files.durable import lock_beside
from neuronrank_torch.files.journal import JOURNAL_FORMAT
from neuronrank_torch.model.device import choose_device
from neuronrank_torch.model.open import Dtype, load_model
from neuronrank_torch.model.source import ModelSource
from neuronrank_torch.paths import local_path
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.prune import prune
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.pruning.scope import planned_layers
from neuronrank_torch.runs.job import Evaluation
from neuronrank_torch.runs.sweep_result import TEXT, Cell, CellFile, SweepResult
from neuronrank_torch.text.sources import SELF, read_documents, text_fingerprint


@dataclass(frozen=True)
class SweepJob:
    """What to measure, on what, and where to keep it.

    Parameters
    ----------
    model, out : str
        Model, and file for the cells, one line of JSON each.
    ratios : tuple of float
    methods, updates : tuple of str
    dataset : str
        Calibration text, unless there are statistics.
    stats : str, optional
        Folder of statistics to prune with.
    evaluation : Evaluation
    batch_size : int, optional
        Sequences, or windows, per micro-batch.
    force : bool
        Discard the cells of another sweep in ``out``.
    device, dtype : str
        As in :class:`neuronrank_torch.runs.job.Job`.
    """

    model: str
    out: str
    ratios: tuple[float, ...]
    methods: tuple[str, ...]
    updates: tuple[str, ...] = ("none",)
    dataset: str = "builtin"
    stats: str | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    batch_size: int | None = None
    force: bool = False
    device: str = "auto"
    dtype: Dtype = "auto"


def recipes_of(
    job: SweepJob, base: Recipe, statistics: StatisticsFolder | None
) -> dict[tuple[str, str, float], Recipe]:
    """The recipe of each cell; raises InputError if there is none for one of them."""
    found = {}
    for method, update, ratio in dict.fromkeys(itertools.product(job.methods, job.updates, job.ratios)):
        recipe = replace(base, method=method, update=update, sparsity_ratio=ratio)
        if statistics is not None:
            recipe = statistics.fitted(replace(recipe, **statistics.fixed))
        check_recipe(recipe)
        found[method, update, ratio] = recipe
    return found


def run_sweep(job: SweepJob, base: Recipe, progress: Progress = silent) -> SweepResult:
    """Prune a copy of a model by each combination and measure it; cells that are there already are not run again.

    The model is in memory twice. Processes started by torchrun share the texts; the first writes the file.

    Parameters
    ----------
    job : SweepJob
    base : Recipe
        What all cells have in common.
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`.

    Raises
    ------
    NeuronRankError
        If the sweep cannot run. Finished cells stay in the file.
    """
    with launched() as ranks:
        sweep = _Sweep.opened(job, base, progress, ranks)
        dense, cells = sweep.cells()
    if all(cell.failed for cell in cells):
        first = cells[0]
        raise NeuronRankError(f"every cell failed; {failures([first])[0]}", hint="change the methods or the ratios")
    names = (job.model, job.out, base.sparsity_type, job.evaluation.dataset)
    return SweepResult(*names, dense, cells, (*sweep.notes(), *failures(cells)), versions())


def failures(cells: Iterable[Cell]) -> list[str]:
    """A line for each cell that failed."""
    return [f"{' '.join(map(str, cell.key))} failed: {cell.failed}" for cell in cells if cell.failed]


@dataclass(frozen=True)
class _Sweep:
    """A job with its inputs and its model loaded."""

    job: SweepJob
    base: Recipe
    progress: Progress
    ranks: Ranks
    statistics: StatisticsFolder | None
    recipes: dict[tuple[str, str, float], Recipe]
    model: Any
    tokenizer: Any
    source: ModelSource
    text: str | None
    eval_text: str
    planned: tuple[str, ...]

    @classmethod
    def opened(cls, job: SweepJob, base: Recipe, progress: Progress, ranks: Ranks) -> "_Sweep":
        """Read the texts and the model; raises InputError if one of the recipes cannot be run."""
        statistics = None if job.stats is None else StatisticsFolder(job.stats)
        recipes = recipes_of(job, base, statistics)
        reads = statistics is None and any(map(needs_text, recipes.values()))
        if reads and job.dataset == SELF:
            raise InputError("sweep cannot write its calibration text", hint="name a text with --dataset")
        documents = ranks.from_first(lambda: read_documents(job.dataset, "calibration")) if reads else None
        evaluated = ranks.from_first(lambda: read_documents(job.evaluation.dataset, "evaluation"))
        progress(f"loading {job.model}", 0, 1, "models")
        model, tokenizer, source = load_model(job.model, dtype=job.dtype, device=job.device)
        if statistics is not None:
            statistics.check_model(source)
        planned = dict.fromkeys(note for recipe in recipes.values() for note in planned_layers(model, recipe)[1])
        text = documents.text(tokenizer) if documents else None
        loaded = (model, tokenizer, source, text, evaluated.text(tokenizer))
        return cls(job, base, progress, ranks, statistics, recipes, *loaded, tuple(planned))

    def setup(self) -> dict[str, Any]:
        """What all cells depend on."""
        job, apart = self.job, ["method", "update", "sparsity_ratio"]
        if self.statistics is not None:  # They say it.
            apart += ["nsamples", "propagate"]
        return {
            "model": self.source.digests(),
            "recipe": {name: value for name, value in asdict(self.base).items() if name not in apart},
            "statistics": self.statistics and self.statistics.header,
            TEXT: None if self.text is None else text_fingerprint(self.text),
            "evaluation": {**asdict(job.evaluation), "text": text_fingerprint(self.eval_text)},
            "device": choose_device(job.device),
            **{name: getattr(job, name) for name in ("dtype", "batch_size")},
            "version of": {**versions(), "journal": JOURNAL_FORMAT},
        }

    def cells(self) -> tuple[Perplexity, tuple[Cell, ...]]:
        """The unpruned model's perplexity and all cells; measures those that are not in the file."""
        file = local_path(self.job.out)
        lock = lock_beside(file)

        def opened() -> CellFile:
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise NeuronRankError(
                    f"another sweep is writing to {file}", hint="wait for it, or choose another --out"
                ) from error
            return CellFile(file, self.setup(), force=self.job.force)

        try:
            return self._cells(self.ranks.from_first(opened))
        finally:
            if lock.is_locked:
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def _cells(self, stored: CellFile) -> tuple[Perplexity, tuple[Cell, ...]]:
        total = len(self.recipes)
        dense = next((Perplexity(**line["dense"]) for line in stored.lines if "dense" in line), None)
        cells = {cell.key: cell for cell in (Cell(**line) for line in stored.lines if "dense" not in line)}

        def keep(line: dict[str, Any]) -> None:
            if self.ranks.first:
                stored.add(line)

        try:
            if dense is None:
                dense = self._perplexity(self.model, "perplexity of the unpruned model", self.progress)
                keep({"dense": dense.to_dict()})
            for number, key in enumerate(self.recipes, start=1):
                if key not in cells:
                    cells[key] = self._cell(key, f"cell {number} of {total}, {' '.join(map(str, key))}")
                    keep(asdict(cells[key]))
        except BaseException as error:
            done = sum(key in cells for key in self.recipes)
            if done or not isinstance(error, InputError):
                add_note(error, f"{done} of {total} cells are finished and kept; rerun the same command to resume")
            elif self.ranks.first:  # The same sweep would meet the error again.
                stored.abandon()
            raise
        return dense, tuple(cells[key] for key in self.recipes)

    def _cell(self, key: tuple[str, str, float], where: str) -> Cell:
        def step(stage: str, done: int, steps: int, unit: str) -> None:
            self.progress(f"{where}: {stage}", done, steps, unit)

        pruned, started = copy.deepcopy(self.model), time.perf_counter()
        try:
            how: dict[str, Any] = {
                "batch_size": self.job.batch_size,
                "statistics": self.statistics,
                "ranks": self.ranks,
            }
            report = prune(pruned, self.tokenizer, self.recipes[key], self.text or "", progress=step, **how)
            seconds = round(time.perf_counter() - started, 3)
            found = self._perplexity(pruned, "perplexity", step)
        except (AllZeroMetricError, NonFiniteError) as error:  # The recipe failed, not the run.
            return Cell(*key, None, None, None, round(time.perf_counter() - started, 3), str(error))
        lost = (report.total.zeros + report.total.removed) / report.total.prunable
        return Cell(*key, lost, found.perplexity, found.standard_error, seconds)

    def _perplexity(self, target: Any, stage: str, progress: Progress) -> Perplexity:
        how: dict[str, Any] = {"batch_size": self.job.batch_size or 1, "ranks": self.ranks, "progress": progress}
        return self.job.evaluation.measure(target, self.tokenizer, self.eval_text, stage=stage, **how)

    def notes(self) -> list[str]:
        """Notes on the model and on the texts."""
        seen = calibration_text(self.statistics, self.tokenizer) if self.statistics else self.text or ""
        return [*self.source.notes, *self.planned, *evaluation_notes(seen, self.eval_text, self.statistics)]
