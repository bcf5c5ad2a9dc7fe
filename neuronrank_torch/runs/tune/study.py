"""The study: trials in a database, which several processes and later runs share."""

import json
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import optuna
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from neuronrank_core import AllZeroMetricError, InputError, NonFiniteError, Recipe
from neuronrank_core.search_space import Space
from neuronrank_torch.files.durable import lock_beside
from neuronrank_torch.files.journal import differences

#: Name of the study in its database.
_NAME = "neuronrank"
#: The search space counts as exhausted after so many proposals in a row that were tried before.
_REPEATS = 100
#: Attributes of a trial: recipe, name of the starting point, process that runs it, number of the trial that it repeats,
#: error message.
RECIPE, START, OWNER, REPEATS, FAILED = "recipe", "start", "owner", "repeats", "failed"
#: Returns the perplexity of the recipe of a trial, or raises optuna.TrialPruned to give the trial up.
Measure = Callable[[optuna.Trial, Recipe], float]


class SeededByTrial(TPESampler):
    """TPE whose random numbers depend only on seed and trial, so that a resumed run does not repeat any.

    Parameters
    ----------
    seed : int
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._start(0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Start the random numbers of the trial."""
        self._start(trial.number)
        super().before_trial(study, trial)

    def _start(self, trial: int) -> None:
        seed = int(np.random.SeedSequence((self.seed, trial)).generate_state(1)[0])
        # One parameter at a time, because a joint model would only cover those that every recipe uses.
        super().__init__(seed=seed, multivariate=False)


class TuningStudy:
    """A search that is stored in a database.

    Parameters
    ----------
    storage : str
        A file for SQLite, or the URL of a database.
    identity : dict
        Everything that the results depend on.
    space : Space
    seed : int
    force : bool
        Discard a different search in the database.

    Raises
    ------
    InputError
        If the database contains a different search. Says what differs.
    """

    def __init__(self, storage: str, identity: dict[str, Any], space: Space, seed: int, *, force: bool) -> None:
        self.space, self.starts = space, space.starts()
        identity = json.loads(json.dumps(identity))
        try:
            url, self.alone = _located(storage)
            with self.alone:
                self._enter(storage, url, identity, seed, force=force)
        except (OSError, SQLAlchemyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"cannot keep trials in {storage}: {reason}", hint="check --storage") from error

    def _enter(self, storage: str, url: str, identity: dict[str, Any], seed: int, *, force: bool) -> None:
        store = optuna.storages.RDBStorage(url)
        create = partial(
            optuna.create_study, storage=store, sampler=SeededByTrial(seed), study_name=_NAME, load_if_exists=True
        )
        self.study = create()
        changes = differences(self.study.user_attrs.get("identity", identity), identity)
        if changes and not force:
            raise InputError(
                f"{storage} contains a different search: {'; '.join(changes[:3])}",
                hint="rerun its command to resume it, choose another --storage, or discard it with --force",
            )
        if changes:
            optuna.delete_study(study_name=_NAME, storage=store)
            self.study = create()
        self.study.set_user_attr("identity", identity)
        self._take_over(store)
        self._enqueue_starts()

    def _take_over(self, store: optuna.storages.RDBStorage) -> None:
        """Queue the unfinished trials of processes of this machine that are gone again, with the same recipes."""
        study = store.get_study_id_from_name(_NAME)
        for trial in self._trials(TrialState.RUNNING):
            if _gone(trial.user_attrs.get(OWNER)):
                number = store.get_trial_id_from_study_id_trial_number(study, trial.number)
                store.set_trial_state_values(number, TrialState.WAITING)

    def _enqueue_starts(self) -> None:
        alive = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
        there = {trial.user_attrs.get(START) for trial in self._trials(*alive)}
        for name, recipe in self.starts.items():
            if name not in there:
                self.study.enqueue_trial(self.space.parameters(recipe), user_attrs={START: name})

    def run(self, trials: int, measure: Measure) -> bool:
        """Run trials up to a total number; False if no recipes are left to try.

        Parameters
        ----------
        trials : int
            Total number, over all runs and processes.
        measure : callable
            See :data:`Measure`.
        """
        repeated = 0
        while repeated < _REPEATS:
            with self.alone:
                if self._at_work() >= trials and not self._trials(TrialState.WAITING):
                    return True
                trial, recipe, twin = self._next()
            if twin is None:
                self._measure(trial, recipe, measure)
            repeated = 0 if twin is None else repeated + 1
        return False

    def _next(self) -> tuple[optuna.Trial, Recipe, int | None]:
        """The next trial and its recipe. If it repeats a trial, it is finished, and the number of that trial."""
        trial = self.study.ask()
        trial.set_user_attr(OWNER, [socket.gethostname(), os.getpid()])
        start = self.starts.get(trial.user_attrs.get(START, ""))
        # A starting point within the space is proposed too, so that the sampler learns from it.
        recipe = self.space.recipe(trial) if start is None or self.space.parameters(start) else start
        trial.set_user_attr(RECIPE, asdict(recipe))
        twin = self._twin(trial.number, asdict(recipe))
        if twin is not None:
            trial.set_user_attr(REPEATS, twin)
            self.study.tell(trial, state=TrialState.PRUNED)
        return trial, recipe, twin

    def _measure(self, trial: optuna.Trial, recipe: Recipe, measure: Measure) -> None:
        try:
            self.study.tell(trial, measure(trial, recipe))
        except optuna.TrialPruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        except (AllZeroMetricError, NonFiniteError) as error:  # The recipe failed, not the run.
            trial.set_user_attr(FAILED, str(error))
            self.study.tell(trial, state=TrialState.PRUNED)

    def done(self) -> list[FrozenTrial]:
        """Trials that were measured or given up."""
        trials = self._trials(TrialState.COMPLETE, TrialState.PRUNED)
        return [trial for trial in trials if REPEATS not in trial.user_attrs]

    def measured(self) -> list[tuple[FrozenTrial, Recipe, float]]:
        """Trials with recipe and perplexity, best first; equal ones in order."""
        complete = self._trials(TrialState.COMPLETE)
        trials = [(t, Recipe(**t.user_attrs[RECIPE]), t.value) for t in complete if t.value is not None]
        return sorted(trials, key=lambda one: (one[2], one[0].number))

    def _twin(self, number: int, recipe: dict[str, Any]) -> int | None:
        """An earlier trial of the same recipe that is finished or running."""
        trials = self._trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return next((t.number for t in trials if t.number < number and t.user_attrs.get(RECIPE) == recipe), None)

    def _at_work(self) -> int:
        """Number of trials that are finished, or running in other processes."""
        mine = [socket.gethostname(), os.getpid()]
        running = self._trials(TrialState.RUNNING)
        others = [t for t in running if (owner := t.user_attrs.get(OWNER)) not in (None, mine) and not _gone(owner)]
        return len(self.done()) + len(others)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)


def _located(storage: str) -> tuple[str, AbstractContextManager[Any]]:
    """URL of a database, and a lock for choosing the next trial.

    SQLite cannot lock rows, and Optuna creates its tables without a lock, so a file next to the database is locked. A
    database server needs no lock.
    """
    if "://" in storage:
        return storage, nullcontext()
    file = Path(storage).expanduser().absolute()
    if not file.parent.is_dir():  # The lock would create it.
        raise FileNotFoundError(f"there is no folder {file.parent}")
    return f"sqlite:///{quote(str(file))}", lock_beside(file)


def _gone(owner: list[Any] | None) -> bool:
    """Whether the process of a trial ran on this machine and is gone. This process has not started any trial yet."""
    if owner is None or owner[0] != socket.gethostname():
        return False
    if owner[1] == os.getpid():
        return True
    try:
        os.kill(owner[1], 0)
    except OSError as error:  # Otherwise it belongs to another user.
        return isinstance(error, ProcessLookupError)
    return False
