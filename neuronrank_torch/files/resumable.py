"""A folder beside the output in which the output grows until it is whole: locked, with a journal of what is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from safetensors import SafetensorError

from neuronrank_core.errors import NeuronRankError, add_note
from neuronrank_torch.files.durable import MODEL, check_output, move_in, settle
from neuronrank_torch.files.journal import Journal

try:
    import fcntl
except ImportError:  # Not POSIX: two runs on one output are not kept apart there.
    fcntl = None  # type: ignore[assignment]


_JOURNAL = "journal.json"


class ResumableFolder:
    """A context manager: the folder is locked inside.

    Left by an exception, it stays where there are finished layers for the same run to go on with, and the exception
    carries a note that says so; else it is removed. Killed, it stays as it is.

    Parameters
    ----------
    target : pathlib.Path
        The output folder, which is not touched before the end.
    identity : dict
        See :class:`neuronrank_torch.files.journal.Journal`.
    layers : int
        Number of decoder layers.
    force : bool
        Discard an unfinished run that is another one.

    Raises
    ------
    NeuronRankError
        On entering, if another process is at work there, or an unfinished run is another one.
    """

    #: Name of the folder inside that becomes the output.
    inner = "output"
    #: What the output is.
    kind = MODEL

    def __init__(
        self,
        target: Path,
        identity: dict[str, Any],
        layers: int,
        *,
        force: bool = False,
    ) -> None:
        self.target, self.identity, self.layers, self.force = target, identity, layers, force
        self.folder = target.with_name(f".{target.name}.partial")
        self.output = self.folder / self.inner

    def __enter__(self) -> Any:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            # Another run may have finished since it was checked.
            check_output(self.target, self.force, self.kind)
            self.journal = self._opened_journal()
            self.output.mkdir(exist_ok=True)
            self.entered()
        except BaseException:
            if not (self.folder / _JOURNAL).exists():
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()
            raise
        return self

    def entered(self) -> None:
        """Called inside the lock, when it is known what is finished."""

    def _locked(self) -> IO[str]:
        file = self.folder / "lock"
        lock = file.open("w")
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A run that finished meanwhile took its file away; a third may hold the lock on a new one.
                if not os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                    raise BlockingIOError
            except OSError as error:
                lock.close()
                raise NeuronRankError(
                    f"another run is writing to {self.target}", hint="wait for it, or choose another output folder"
                ) from error
        return lock

    def _opened_journal(self) -> Journal:
        file = self.folder / _JOURNAL
        try:
            journal = Journal(file, self.identity)
        except NeuronRankError:
            if not self.force:
                raise
            file.unlink()
            journal = Journal(file, self.identity)
        # Files that a killed process was writing, and all of a run that goes on no more.
        wanted = {"lock", file.name, *journal.shards}
        for left in [*self.folder.iterdir(), *(self.output.iterdir() if self.output.exists() else ())]:
            if left.is_file() and left.name not in wanted:
                left.unlink()
        return journal

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = len(self.journal.shards)
        if error is None or done == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            note = (
                f"{min(done, self.layers)} of {self.layers} layers are done and kept: "
                "the same command goes on from there"
            )
            add_note(error, note)
        self._lock.close()

    def finished(self, file: Path) -> bool:
        """Whether a file is there as a whole, by this process or one before."""
        size = self.journal.shards.get(file.name)
        return size is not None and file.is_file() and file.stat().st_size == size

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Have what fails while writing say what it was for."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise NeuronRankError(
                f"could not save to {self.target}: {error}",
                hint="check free space and permissions; nothing was changed there",
            ) from error

    def hand_over(self, header: Path) -> None:
        """Give the finished folder the output's name; all of its files get the permissions of ``header``, one of them.

        Raises
        ------
        OSError
            If that fails; nothing is changed under the output's name then.
        InputError
            If something is there by now that must not be replaced.
        """
        settle(self.output, header)
        check_output(self.target, self.force, self.kind)
        move_in(self.output, self.target)
