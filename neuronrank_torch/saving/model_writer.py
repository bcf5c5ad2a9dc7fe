"""The folder beside the output in which a run's result grows, shard by shard, until it is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from neuronrank_torch.calibration.hidden_states import HiddenStates, room
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.files.durable import write_durably
from neuronrank_torch.files.resumable import ResumableFolder
from neuronrank_torch.model.quiet import quiet_transformers
from neuronrank_torch.model.split_experts import whole_experts
from neuronrank_torch.model.streaming import HEAD, REST, StreamedModel, Unit
from neuronrank_torch.model.tensor_files import join_shards, write_index, write_shard
from neuronrank_torch.model.weights import FromFirst, SafetensorsWeights, WeightSource
from neuronrank_torch.pruning.result import LayerReport
from neuronrank_torch.pruning.store import LayerStore
from neuronrank_torch.saving.receiver import Opened

REPORT_NAME = "neuronrank.json"
#: Up to this size a model is saved as one file; a larger one as a shard per layer.
SINGLE_FILE_BYTES = 2 << 30


class ModelWriter(ResumableFolder, LayerStore):
    """The output of a prune: see :class:`neuronrank_torch.files.resumable.ResumableFolder`.

    Parameters
    ----------
    target : pathlib.Path
        The output folder, which is not touched before :meth:`finish`.
    model : StreamedModel
        Whose units become the shards.
    identity, force
        See :class:`neuronrank_torch.files.resumable.ResumableFolder`.
    hidden_states : {"memory", "disk"}
        Where hidden states are kept; disk is a file in the folder that is mapped to memory.
    propagate_dense : bool
        Whether text goes on through the original weights of finished layers instead of the pruned ones.
    ranks : Ranks
        Of which this is the first; the others are :class:`neuronrank_torch.saving.receiver.Receiver`.
    """

    inner = "model"

    def __init__(
        self,
        target: Path,
        model: StreamedModel,
        identity: dict[str, Any],
        *,
        force: bool = False,
        propagate_dense: bool = False,
        hidden_states: HiddenStates = "memory",
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(target, identity, len(model.decoder.layers), force=force)
        self.model, self.propagate_dense, self.hidden_states, self.ranks = model, propagate_dense, hidden_states, ranks
        tensors = [tensor for unit in model.units for tensor in model.tensors(unit).values()]
        self._join = (
            sum(tensor.nbytes for tensor in tensors) <= SINGLE_FILE_BYTES and len({t.dtype for t in tensors}) == 1
        )

    def entered(self) -> None:
        """Give finished units the shapes that they have now, and tell the other ranks.

        A unit that cannot be read is not finished.
        """
        shapes = {}
        for unit in self.units_done():
            try:
                shapes[unit] = self.source(unit).shapes()
                self.model.reshape(unit, shapes[unit])
            except (SafetensorError, KeyError):
                del self.journal.shards[self.shard(unit).name]
                shapes.pop(unit, None)
        self.ranks.from_first(lambda: Opened(shapes, self.journal.ratios, self.journal.measured))

    def shard(self, unit: Unit) -> Path:
        """File of a unit."""
        number = 1 + list(self.model.units).index(unit)
        folder = self.folder if self._join else self.output
        return folder / f"model-{number:05d}-of-{len(self.model.units):05d}.safetensors"

    def done(self, unit: Unit) -> bool:
        """Whether a unit is finished, in this process or one before."""
        return unit in self.model.units and self.finished(self.shard(unit))

    def units_done(self) -> list[Unit]:
        """The units that are finished."""
        return [unit for unit in self.model.units if self.done(unit)]

    def report(self, unit: Unit) -> LayerReport | None:
        """What was done to a finished unit."""
        report = self.journal.reports[self.shard(unit).name]
        return None if report is None else LayerReport.from_dict(report)

    def source(self, *units: Unit) -> WeightSource:
        """Weights of finished units."""
        return whole_experts(SafetensorsWeights(self.shard(unit) for unit in units))

    def resident(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has the weights to go on with."""
        return self.model.resident(unit) if self.propagate_dense else self.pruned(unit)

    def pruned(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has its pruned weights, if it is finished."""
        return self.model.resident(unit, FromFirst(self.ranks, self.source(unit)) if self.done(unit) else None)

    def keep(self, unit: Unit, report: LayerReport | None = None) -> None:
        """Make a unit durable as it is in memory now."""
        self._write(unit)
        self.journal.finish(self.shard(unit), None if report is None else asdict(report))

    def ratios(self) -> list[float] | None:
        """Sparsity ratios of the layers, once they are worked out."""
        return self.journal.ratios

    def keep_ratios(self, ratios: list[float]) -> None:
        """Make the ratios durable: finished layers no longer tell them."""
        self.journal.allocated(ratios)

    def measured(self, what: str, measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """A perplexity that was measured before, or is now; made durable."""
        if what not in self.journal.measured:
            perplexity = measure()
            if perplexity is None:
                return None
            self.journal.measure(what, perplexity)
        return self.journal.measured[what]

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room for hidden states."""
        with self.saving():
            return room(self.hidden_states, self.folder / "hidden", shape, like)

    def _write(self, unit: Unit) -> None:
        with self.saving():
            tensors = self.model.source.as_stored(self.model.tensors(unit))
            write_durably(self.shard(unit), lambda path: write_shard(tensors, path))

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
            If writing fails, or something is there by now that must not be replaced.
        """
        text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        with self.saving():
            self._complete_shards()
            with quiet_transformers():
                self._save_configuration()
                save_tokenizer(tokenizer, self.output)
            (self.output / REPORT_NAME).write_text(text, encoding="utf-8")
            self.hand_over(self.output / REPORT_NAME)

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


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer; raises OSError where it cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # Tokenizers in Rust raise this very class, and nothing more telling, when a disk is full.
        if type(error) is Exception:
            raise OSError(str(error)) from error
        raise
