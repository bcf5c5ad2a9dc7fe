"""The folder beside the output in which a run's result grows, shard by shard, until it is whole."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from neuronrank_core.errors import NeuronRankError
from neuronrank_torch.checkpoint import move_in, settle, write_durably
from neuronrank_torch.journal import Journal
from neuronrank_torch.layer_store import LayerStore
from neuronrank_torch.models import quiet_transformers
from neuronrank_torch.report import LayerReport
from neuronrank_torch.shards import join_shards, write_index, write_shard
from neuronrank_torch.streamed_model import HEAD, REST, StreamedModel, Unit
from neuronrank_torch.weights import SafetensorsWeights, WeightSource

try:
    import fcntl
except ImportError:  # Not POSIX: two runs on one output are not kept apart there.
    fcntl = None  # type: ignore[assignment]

HiddenStates = Literal["memory", "disk"]

REPORT_NAME = "neuronrank.json"
#: Up to this size a model is saved as one file; a larger one as a shard per layer.
SINGLE_FILE_BYTES = 2 << 30


class Staging(LayerStore):
    """A context manager: the folder is locked inside.

    Left by an exception, it stays where there are finished layers for the same run to go on with, and the exception
    carries a note that says so; else it is removed. Killed, it stays as it is.

    Parameters
    ----------
    target : pathlib.Path
        The output folder, which is not touched before :meth:`finish`.
    model : StreamedModel
        Whose units become the shards.
    identity : dict
        See :class:`neuronrank_torch.journal.Journal`.
    force : bool
        Discard an unfinished run that is another one.
    propagate_dense : bool
        Whether text goes on through the original weights of finished layers instead of the pruned ones.
    hidden_states : {"memory", "disk"}
        Where hidden states are kept; disk is a file here that is mapped to memory.

    Raises
    ------
    NeuronRankError
        On entering, if another process is at work there, or an unfinished run is another one.
    """

    def __init__(
        self,
        target: Path,
        model: StreamedModel,
        identity: dict[str, Any],
        *,
        force: bool = False,
        propagate_dense: bool = False,
        hidden_states: HiddenStates = "memory",
    ) -> None:
        self.target, self.model, self.identity, self.force = target, model, identity, force
        self.propagate_dense, self.hidden_states = propagate_dense, hidden_states
        self.folder = target.with_name(f".{target.name}.partial")
        self.output = self.folder / "model"
        tensors = [tensor for unit in model.units for tensor in model.tensors(unit).values()]
        self._join = (
            sum(tensor.nbytes for tensor in tensors) <= SINGLE_FILE_BYTES and len({t.dtype for t in tensors}) == 1
        )

    def __enter__(self) -> Staging:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            self.journal = self._opened_journal()
            self.output.mkdir(exist_ok=True)
            for unit in self.units_done():
                self.model.reshape(unit, self.source(unit).shapes())
        except BaseException:
            self._lock.close()
            raise
        return self

    def _locked(self) -> IO[str]:
        lock = (self.folder / "lock").open("w")
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.close()
                raise NeuronRankError(
                    f"another run is writing to {self.target}", hint="wait for it, or choose another output folder"
                ) from error
        return lock

    def _opened_journal(self) -> Journal:
        file = self.folder / "journal.json"
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
        done = len(self.units_done())
        if error is None or done == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            layers = len(self.model.decoder.layers)
            note = f"{min(done, layers)} of {layers} layers are done and kept: the same command goes on from there"
            # PEP 678 by hand: Python 3.10 has no BaseException.add_note.
            error.__notes__ = [*getattr(error, "__notes__", []), note]
        self._lock.close()

    def shard(self, unit: Unit) -> Path:
        """File of a unit."""
        number = 1 + list(self.model.units).index(unit)
        folder = self.folder if self._join else self.output
        return folder / f"model-{number:05d}-of-{len(self.model.units):05d}.safetensors"

    def done(self, unit: Unit) -> bool:
        """Whether a unit is finished, in this process or one before."""
        if unit not in self.model.units:
            return False
        shard = self.shard(unit)
        size = self.journal.shards.get(shard.name)
        return size is not None and shard.is_file() and shard.stat().st_size == size

    def units_done(self) -> list[Unit]:
        """The units that are finished."""
        return [unit for unit in self.model.units if self.done(unit)]

    def report(self, unit: Unit) -> LayerReport | None:
        """What was done to a finished unit."""
        return self.journal.reports[self.shard(unit).name]

    def source(self, *units: Unit) -> WeightSource:
        """Weights of finished units."""
        return SafetensorsWeights(self.shard(unit) for unit in units)

    def resident(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has the weights to go on with."""
        return self.model.resident(unit) if self.propagate_dense else self.pruned(unit)

    def pruned(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has its pruned weights, if it is finished."""
        return self.model.resident(unit, self.source(unit) if self.done(unit) else None)

    def keep(self, unit: Unit, report: LayerReport | None = None) -> None:
        """Make a unit durable as it is in memory now."""
        self._write(unit)
        self.journal.finish(self.shard(unit), report)

    def ratios(self) -> list[float] | None:
        """Sparsity ratios of the layers, once they are worked out."""
        return self.journal.ratios

    def keep_ratios(self, ratios: list[float]) -> None:
        """Make the ratios durable: finished layers no longer tell them."""
        self.journal.allocated(ratios)

    def _write(self, unit: Unit) -> None:
        write_durably(self.shard(unit), lambda path: write_shard(self.model.tensors(unit), path))

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room for hidden states; on disk, the file is gone when nobody needs it any more."""
        if self.hidden_states == "memory":
            return super().room(shape, like)
        file = self.folder / "hidden"
        size = torch.Size(shape).numel()
        mapped = torch.from_file(str(file), shared=True, size=size, dtype=like.dtype).view(shape)
        with suppress(OSError):  # Not POSIX: it goes with the folder.
            file.unlink()
        return mapped

    def finish(self, tokenizer: Any, report: dict[str, Any]) -> None:
        """Complete the model and give it the output's name.

        Parameters
        ----------
        tokenizer : transformers.PreTrainedTokenizerBase
        report : dict
            What was done, for ``neuronrank.json``. Must be JSON: strings as keys, no NaN.

        Raises
        ------
        NeuronRankError
            If writing fails.
        """
        text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._complete_shards()
            with quiet_transformers():
                self._save_configuration()
                tokenizer.save_pretrained(self.output)
            (self.output / REPORT_NAME).write_text(text, encoding="utf-8")
            settle(self.output, self.output / REPORT_NAME)
            move_in(self.output, self.target)
        except (OSError, SafetensorError) as error:
            raise NeuronRankError(
                f"could not save to {self.target}: {error}",
                hint="check free space and permissions; nothing was changed there",
            ) from error

    def _complete_shards(self) -> None:
        self._write(REST)
        if HEAD in self.model.units and not self.done(HEAD):
            with self.model.resident(HEAD):
                self._write(HEAD)
        shards = [self.shard(unit) for unit in self.model.units]
        (join_shards if self._join else write_index)(shards, self.output)

    def _save_configuration(self) -> None:
        """What transformers saves beside the weights; its own ``save_pretrained`` wants all of those at once."""
        model = self.model.model
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype
        model.config.save_pretrained(self.output)
        if model.can_generate():
            model.generation_config.save_pretrained(self.output)
