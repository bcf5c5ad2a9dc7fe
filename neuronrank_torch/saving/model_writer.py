"""Writes a pruned model, one shard at a time. The folder gets its name when the model is complete."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from neuronrank_torch.calibration.hidden_states import HiddenStates
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.files.durable import write_durably
from neuronrank_torch.files.json import write_json
from neuronrank_torch.model.quiet import quiet_transformers
from neuronrank_torch.model.split_experts import whole_experts
from neuronrank_torch.model.streaming import HEAD, REST, StreamedModel, Unit
from neuronrank_torch.model.tensor_files import join_shards, write_index, write_shard
from neuronrank_torch.model.weights import FromFirst, SafetensorsWeights, WeightSource
from neuronrank_torch.pruning.result import LayerReport, ModuleReport
from neuronrank_torch.pruning.store import LayerStore
from neuronrank_torch.saving.output_writer import OutputWriter
from neuronrank_torch.saving.receiver import Opened

REPORT_NAME = "neuronrank.json"
#: Up to this size a model is saved as one file; a larger one with one shard per layer.
SINGLE_FILE_BYTES = 2 << 30


class ModelWriter(OutputWriter, LayerStore):
    """The output of a pruning run; see :class:`neuronrank_torch.saving.output_writer.OutputWriter`.

    Parameters
    ----------
    target : pathlib.Path
        The output folder. It is not touched before :meth:`finish`.
    model : StreamedModel
        The model to write. Each of its units becomes a shard.
    identity, force, hidden_states, ranks
        See :class:`neuronrank_torch.saving.output_writer.OutputWriter`.
    propagate_dense : bool
        Whether calibration text is propagated through the original weights of finished layers instead of the pruned
        ones.
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
        layers = len(model.decoder.layers)
        super().__init__(target, identity, layers, force=force, hidden_states=hidden_states, ranks=ranks)
        self.model, self.propagate_dense = model, propagate_dense
        tensors = [tensor for unit in model.units for tensor in model.tensors(unit).values()]
        self._join = (
            sum(tensor.nbytes for tensor in tensors) <= SINGLE_FILE_BYTES and len({t.dtype for t in tensors}) == 1
        )

    def entered(self) -> None:
        """Reshape finished units to their shapes on disk, and tell the other ranks.

        A unit that cannot be read counts as not finished.
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
        """Path of the shard that holds a unit."""
        number = 1 + list(self.model.units).index(unit)
        folder = self.folder if self._join else self.output
        return folder / f"model-{number:05d}-of-{len(self.model.units):05d}.safetensors"

    def done(self, unit: Unit) -> bool:
        """Whether this process or an earlier one finished a unit."""
        return unit in self.model.units and self.finished(self.shard(unit))

    def units_done(self) -> list[Unit]:
        """The finished units, in the order of the model."""
        return [unit for unit in self.model.units if self.done(unit)]

    def report(self, unit: Unit) -> LayerReport | None:
        """Changes to a finished unit; None if it was left unchanged."""
        report = self.journal.reports[self.shard(unit).name]
        return None if report is None else layer_report(report)

    def source(self, unit: Unit) -> WeightSource:
        """Weights of a finished unit, read from its shard."""
        return whole_experts(SafetensorsWeights([self.shard(unit)]))

    def resident(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has the weights through which calibration text is propagated."""
        return self.model.resident(unit) if self.propagate_dense else self.pruned(unit)

    def pruned(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has its pruned weights if it is finished, otherwise its original ones."""
        return self.model.resident(unit, FromFirst(self.ranks, self.source(unit)) if self.done(unit) else None)

    def keep(self, unit: Unit, report: LayerReport | None = None) -> None:
        """Save a unit as it is in memory now, and record it in the journal.

        Raises
        ------
        NeuronRankError
            If writing fails.
        """
        self._write(unit)
        self.journal.finish(self.shard(unit), None if report is None else asdict(report))

    def ratios(self) -> list[float] | None:
        """Sparsity ratios of the layers; None if they have not been computed."""
        return self.journal.ratios

    def keep_ratios(self, ratios: list[float]) -> None:
        """Record the ratios in the journal: they cannot be computed again once layers are pruned."""
        self.journal.allocate(ratios)

    def measured(self, name: str, measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """A perplexity from the journal; if it has none of this name, measure and record it."""
        if name not in self.journal.measured:
            perplexity = measure()
            if perplexity is None:
                return None
            self.journal.measure(name, perplexity)
        return self.journal.measured[name]

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
            Content of ``neuronrank.json``: settings and figures of the run. Strings as keys, no NaN.

        Raises
        ------
        NeuronRankError
            If writing fails, or the output has come into existence meanwhile and must not be replaced.
        ValueError, TypeError
            If the report cannot be written as JSON.
        """
        file = self.output / REPORT_NAME
        with self.saving():
            self._complete_shards()
            with quiet_transformers():
                self._save_configuration()
                save_tokenizer(tokenizer, self.output)
            write_json(file, report)
            self.publish(file)

    def _complete_shards(self) -> None:
        self._write(REST)
        if HEAD in self.model.units and not self.done(HEAD):
            with self.model.resident(HEAD):
                self._write(HEAD)
        shards = [self.shard(unit) for unit in self.model.units]
        (join_shards if self._join else write_index)(shards, self.output)

    def _save_configuration(self) -> None:
        """Save the configuration as transformers does; its ``save_pretrained`` needs all weights in memory."""
        model = self.model.model
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype
        model.config.save_pretrained(self.output)
        if model.can_generate():
            model.generation_config.save_pretrained(self.output)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer; raises OSError if it cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # Tokenizers written in Rust raise a plain Exception when the disk is full.
        if type(error) is Exception:
            raise OSError(str(error)) from error
        raise


def layer_report(content: dict[str, Any]) -> LayerReport:
    """The report in a journal; those of before list the modules with their names."""
    found = content["modules"]
    found = found if isinstance(found, dict) else {module["name"]: module for module in found}
    modules = {name: ModuleReport(m["size"], m["zeros"], m["removed"]) for name, m in found.items()}
    return LayerReport(**{**content, "modules": modules, "notes": tuple(content["notes"])})
