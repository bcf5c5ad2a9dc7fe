"""A folder beside the output in which the output is built: locked, with a journal of the finished parts."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from neuronrank_core.errors import InputError, NeuronRankError, UnreachableError, UnsupportedModelError, add_note
from neuronrank_torch.calibration.hidden_states import HiddenStates, room
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.files.durable import MODEL, check_output, flush_folder, rename_into_place, write_durably
from neuronrank_torch.files.journal import Journal
from neuronrank_torch.text.sources import SELF_FILE, read_documents

_JOURNAL, _LOCK = "journal.json", "lock"


@dataclass(eq=False)
class OutputWriter:
    """What the writers of a model and of statistics share: a context manager that holds the folder's lock.

    If an exception leaves the context after a layer is finished or a candidate is measured, the folder is kept for the
    same run to resume from, and the exception gets a note that says so. Otherwise, and after an error that the same run
    would meet again, the folder is removed. A killed process leaves it as it is; the system releases its lock.

    Parameters
    ----------
    target : pathlib.Path
        The output folder. It is not touched before :meth:`publish`.
    identity : dict
        See :class:`neuronrank_torch.files.journal.Journal`.
    layers : int
        Number of decoder layers, if it is known from the start.
    force : bool
        Whether to replace an existing output, and to discard an unfinished run that differs from this one.
    hidden_states : {"memory", "disk"}
        Where hidden states are kept. On disk, they are a memory-mapped file in the folder.
    ranks : Ranks
        The processes of the run. All but the first use :class:`neuronrank_torch.saving.receiver.Receiver`.

    Raises
    ------
    InputError
        On entering, if the folder cannot be created.
    NeuronRankError
        On entering, if another process holds the lock, or an unfinished run differs from this one.
    """

    #: Name of the subfolder that becomes the output.
    inner = "output"
    #: Kind of the output.
    kind = MODEL

    target: Path
    identity: dict[str, Any]
    layers: int = 0
    _: KW_ONLY
    force: bool = False
    hidden_states: HiddenStates = "memory"
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self.output = self.folder / self.inner
        self._lock = FileLock(self.folder / _LOCK)

    def __enter__(self) -> Any:
        self._parents = [parent for parent in self.folder.parents if not parent.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"cannot create {self.target}: {reason}", hint="choose another output folder") from error
        try:
            # Fails also if the run that held the lock has just removed the folder.
            self._lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError) as error:
            raise NeuronRankError(
                f"another run is writing to {self.target}", hint="wait for it, or choose another output folder"
            ) from error
        try:
            # Another run may have finished since the first check.
            check_output(self.target, self.force, self.kind)
            self.journal = self._open_journal()
            self.output.mkdir(exist_ok=True)
            # What a killed process left half-written, and the shards of a discarded run.
            wanted = {_LOCK, _JOURNAL, *self.journal.shards}
            for entry in [*self.folder.iterdir(), *self.output.iterdir()]:
                if entry.is_file() and entry.name not in wanted:
                    entry.unlink()
            self.entered()
        except BaseException:
            if (self.folder / _JOURNAL).exists():
                self._lock.release()
            else:
                self._remove()
            raise
        return self

    def entered(self) -> None:
        """Called with the lock held, once the journal is loaded."""

    def _open_journal(self) -> Journal:
        file = self.folder / _JOURNAL
        try:
            return Journal(file, self.identity)
        except NeuronRankError:
            if not self.force:
                raise
            file.unlink()
            return Journal(file, self.identity)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        text, compared = SELF_FILE in self.journal.shards, self.compared()
        done = len(self.journal.shards) - text
        again = isinstance(error, (UnreachableError, UnsupportedModelError))
        if error is None or again or not (done or compared or text):
            self._remove()
        else:
            layers = f"{min(done, self.layers)} of {self.layers} layers are finished and saved"
            measured = f"measurements of candidates are saved ({compared})"
            finished = layers if done else measured if compared else "the calibration text is written and saved"
            add_note(error, f"{finished}: rerun the same command to resume")
            self._lock.release()

    def compared(self) -> int:
        """Number of candidates that this process or an earlier one measured."""
        return len(self.journal.measured.keys() - {"before"})

    def _remove(self) -> None:
        """Remove the folder, and its parents if they are new and empty, and release the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        lock = self.folder / _LOCK
        left = lock.exists()
        self._lock.release()
        if left:  # Windows cannot delete an open file. If another run holds the lock by now, that fails again.
            with suppress(OSError):
                lock.unlink(missing_ok=True)
                self.folder.rmdir()
        with suppress(OSError):
            for parent in self._parents:
                parent.rmdir()

    def finished(self, file: Path) -> bool:
        """Whether this process or an earlier one finished a file, and it is still complete."""
        size = self.journal.shards.get(file.name)
        return size is not None and file.is_file() and file.stat().st_size == size

    def own_text(self, write: Callable[[], list[str]]) -> list[str]:
        """The documents that the model wrote, in an earlier process or now; they are saved in the output.

        Parameters
        ----------
        write : callable
            Has the model write them.

        Raises
        ------
        NeuronRankError
            If saving fails.
        """
        return self.ranks.from_first(lambda: self._own_text(write))

    def _own_text(self, write: Callable[[], list[str]]) -> list[str]:
        file = self.output / SELF_FILE
        if not self.finished(file):
            lines = [json.dumps({"text": text}) + "\n" for text in write()]
            with self.saving():
                write_durably(file, lambda path: path.write_text("".join(lines), encoding="utf-8"))
            self.journal.finish(file, None)
        return read_documents(str(file), "calibration").texts

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Context that turns an error while writing into a NeuronRankError that names the output."""
        try:
            yield
        except Exception as error:
            # Tokenizers written in Rust raise a plain Exception when the disk is full.
            if type(error) is not Exception and not isinstance(error, (OSError, SafetensorError)):
                raise
            raise NeuronRankError(
                f"could not save to {self.target}: {error}",
                hint="check free space and permissions; the output was not changed",
            ) from error

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor for hidden states, with the precision and device of ``like`` if in memory.

        Raises
        ------
        NeuronRankError
            If the disk has no space for it.
        """
        with self.saving():
            return room(self.hidden_states, self.folder / "hidden", shape, like)

    def publish(self, header: Path) -> None:
        """Rename the finished subfolder to the output's name; its files get the permissions of ``header``, one of them.

        Raises
        ------
        OSError
            If that fails. The output is unchanged then.
        InputError
            If the output has come into existence meanwhile and must not be replaced.
        """
        flush_folder(self.output, header)
        check_output(self.target, self.force, self.kind)
        rename_into_place(self.output, self.target)
