"""Perplexity at every ratio, with every method and update: what ``neuronrank sweep`` calls."""

import copy
import itertools
import json
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from neuronrank_core import AllZeroMetricError, InputError, NonFiniteError, Recipe
from neuronrank_core.errors import add_note
from neuronrank_core.methods import check_recipe, needs_text
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.distributed.process_group import launched
from neuronrank_torch.evaluation.perplexity import Perplexity
from neuronrank_torch.evaluation.seen_text import calibration_text, evaluation_notes
from neuronrank_torch.files.durable import write_durably
from neuronrank_torch.files.journal import differences
from neuronrank_torch.model.open import Dtype, load_model
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.prune import prune
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.pruning.scope import planned_layers
from neuronrank_torch.runs.job import Evaluation
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


@dataclass(frozen=True)
class Cell:
    """One combination that was measured.

    Parameters
    ----------
    method : str
        Scoring method.
    update : str
        Update of the remaining weights.
    ratio : float
        Fraction that was asked for.
    share : float or None
        Fraction of the prunable weights that is zero or removed; null if pruning failed.
    perplexity, standard_error : float or None
        On the evaluation text, as in :class:`~neuronrank_torch.evaluation.perplexity.Perplexity`; null if it failed.
    seconds : float
        Wall time of pruning.
    failed : str or None
        Error message.
    """

    method: str
    update: str
    ratio: float
    share: float | None
    perplexity: float | None
    standard_error: float | None
    seconds: float
    failed: str | None = None

    @property
    def key(self) -> tuple[str, str, float]:
        """What tells it from the others of its sweep."""
        return self.method, self.update, self.ratio


@dataclass(frozen=True)
class SweepResult:
    """Result of ``neuronrank sweep``.

    Parameters
    ----------
    model : str
        The model, as it was named.
    out : str
        The file of the cells.
    sparsity_type : str
        As ``--sparsity_type`` takes it.
    evaluated_on : str
        The evaluation text, as it was named.
    dense : Perplexity
        Of the unpruned model.
    cells : tuple of Cell
        By method, update and ratio.
    notes : tuple of str
        Warnings.
    versions : dict of str
        Version of each package that influences the result.
    schema : int
        Version of this format.
    """

    model: str
    out: str
    sparsity_type: str
    evaluated_on: str
    dense: Perplexity
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    schema: int = 1


class _CellFile:
    """The cells of a sweep on disk, each with what all of them depend on; rewritten as a whole for every cell."""

    def __init__(self, file: Path, setup: dict[str, Any], *, force: bool) -> None:
        self.file, self.setup = file, json.loads(json.dumps(setup))
        self.lines: list[dict[str, Any]] = []
        try:
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            stored = [(line.pop("setup"), line) for line in map(json.loads, lines)]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{file} is not a file of cells", hint="choose another --out") from error
        changes = [change for setup, _ in stored[:1] for change in differences(setup, self.setup)]
        if changes and not force:
            raise InputError(
                f"{file} contains a different sweep: {'; '.join(changes[:3])}",
                hint="rerun its command to resume it, choose another --out, or discard it with --force",
            )
        if not changes:
            self.lines = [line for _, line in stored]

    def add(self, line: dict[str, Any]) -> None:
        """Keep one more."""
        self.lines.append(line)
        text = "".join(json.dumps({**one, "setup": self.setup}) + "\n" for one in self.lines)
        write_durably(self.file, lambda path: path.write_text(text, encoding="utf-8"))


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
        for recipe in recipes.values():
            planned_layers(model, recipe)
        text, eval_text = documents.text(tokenizer) if documents else "", evaluated.text(tokenizer)
        unswept = ("method", "update", "sparsity_ratio")
        setup = {
            "model": source.digests(),
            "recipe": {name: value for name, value in asdict(base).items() if name not in unswept},
            "statistics": statistics and statistics.header,
            "calibration text": text_fingerprint(text) if reads else None,
            "evaluation": {**asdict(job.evaluation), "text": text_fingerprint(eval_text)},
            **{name: getattr(job, name) for name in ("device", "dtype", "batch_size")},
            "version of": versions(),
        }
        stored = ranks.from_first(partial(_CellFile, Path(job.out).expanduser(), setup, force=job.force))
        total = len(recipes)

        def cell(key: tuple[str, str, float], recipe: Recipe, where: str) -> Cell:
            def step(stage: str, done: int, steps: int, unit: str) -> None:
                progress(f"{where}: {stage}", done, steps, unit)

            pruned, started = copy.deepcopy(model), time.perf_counter()
            try:
                how: dict[str, Any] = {"batch_size": job.batch_size, "statistics": statistics, "ranks": ranks}
                report = prune(pruned, tokenizer, recipe, text, progress=step, **how)
                seconds = round(time.perf_counter() - started, 3)
                found = measure(pruned, "perplexity", step)
            except (AllZeroMetricError, NonFiniteError) as error:  # The recipe failed, not the run.
                return Cell(*key, None, None, None, round(time.perf_counter() - started, 3), str(error))
            lost = (report.total.zeros + report.total.removed) / report.total.prunable
            return Cell(*key, lost, found.perplexity, found.standard_error, seconds)

        def measure(target: Any, stage: str, progress: Progress) -> Perplexity:
            how: dict[str, Any] = {"batch_size": job.batch_size or 1, "ranks": ranks, "progress": progress}
            return job.evaluation.measure(target, tokenizer, eval_text, stage=stage, **how)

        def keep(line: dict[str, Any]) -> None:
            if ranks.first:
                stored.add(line)

        dense = next((Perplexity(**line["dense"]) for line in stored.lines if "dense" in line), None)
        cells = {cell.key: cell for cell in (Cell(**line) for line in stored.lines if "dense" not in line)}
        try:
            if dense is None:
                dense = measure(model, "perplexity of the unpruned model", progress)
                keep({"dense": dense.to_dict()})
            for number, (key, recipe) in enumerate(recipes.items(), start=1):
                if key in cells:
                    continue
                cells[key] = cell(key, recipe, f"cell {number} of {total}, {' '.join(map(str, key))}")
                keep(asdict(cells[key]))
        except BaseException as error:
            done = sum(key in cells for key in recipes)
            add_note(error, f"{done} of {total} cells are finished and kept; rerun the same command to resume")
            raise
        seen = calibration_text(statistics, tokenizer) if statistics else text
        notes = [*source.notes, *evaluation_notes(seen, eval_text, statistics)]
        notes += [f"{' '.join(map(str, key))} failed: {cells[key].failed}" for key in recipes if cells[key].failed]
        measured = tuple(cells[key] for key in recipes)
        names = (job.model, job.out, base.sparsity_type, job.evaluation.dataset)
        return SweepResult(*names, dense, measured, tuple(notes), versions())
