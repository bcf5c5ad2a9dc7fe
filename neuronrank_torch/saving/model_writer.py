"""Writes a pruned model, one shard at a time. The folder gets its name when the model is complete."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME

from neuronrank_torch.files.durable import write_durably
from neuronrank_torch.files.json import write_json
from neuronrank_torch.model.depth import forget_predictors
from neuronrank_torch.model.quiet import quiet_transformers
from neuronrank_torch.model.streaming import HEAD, REST, StreamedModel, Unit
from neuronrank_torch.model.tensor_files import join_shards, write_index, write_shard
from neuronrank_torch.model.weights import WeightSource, from_first
from neuronrank_torch.pruning.result import LayerReport
from neuronrank_torch.pruning.store import LayerStore
from neuronrank_torch.saving.names import Names
from neuronrank_torch.saving.older_readers import add_older_keys, rename_tokenizer
from neuronrank_torch.saving.output_writer import OutputWriter
from neuronrank_torch.saving.receiver import Opened
from neuronrank_torch.schema import from_json

REPORT_NAME = "neuronrank.json"
#: Up to this size a model is saved as one file; a larger one with one shard per layer.
SINGLE_FILE_BYTES = 2 << 30


class ModelWriter(OutputWriter, LayerStore):
    """The output of a pruning run; see :class:`neuronrank_torch.saving.output_writer.OutputWriter`.

    Parameters
    ----------
    target : pathlib.Path
        The output folder. It is not touched before :meth:`finish`.
    model : StreamedModel or None
        The model to write. Each of its units becomes a shard. None if it is pruned in memory as a whole: then
        :meth:`set_model` is called once that is done, and no shard is resumed from.
    identity, force, hidden_states, ranks
        See :class:`neuronrank_torch.saving.output_writer.OutputWriter`.
    propagate_dense : bool
        Whether calibration text is propagated through the original weights of finished layers instead of the pruned
        ones.
    smaller : bool
        Whether something is removed from the model.
    """

    inner = "model"

    def __init__(
        self,
        target: Path,
        model: StreamedModel | None,
        identity: dict[str, Any],
        *,
        propagate_dense: bool = False,
        smaller: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(target, identity, **options)
        self.propagate_dense, self.smaller, self._at_once = propagate_dense, smaller, model is None
        if model is not None:
            self.set_model(model)

    def set_model(self, model: StreamedModel) -> None:
        """Set the model to write."""
        self.model, self.layers, self.names = model, len(model.decoder.layers), Names.of(model, smaller=self.smaller)
        tensors = [tensor for unit in model.units for tensor in model.tensors(unit).values()]
        tensors += self.names.copies().values()
        precisions = {tensor.dtype for tensor in tensors}
        self._join = len(precisions) == 1 and sum(tensor.nbytes for tensor in tensors) <= SINGLE_FILE_BYTES

    def entered(self) -> None:
        """Reshape finished units to their shapes on disk, and tell the other ranks.

        A unit that cannot be read counts as not finished.
        """
        shapes = {}
        for unit in [] if self._at_once else self.units_done():
            try:
                found = self.source(unit).shapes()
                self.model.reshape(unit, found)
                shapes[unit] = found
            except (SafetensorError, KeyError):
                del self.journal.shards[self.shard(unit).name]
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
        if report is None:
            return None
        if isinstance(report["modules"], list):  # As journals were written before.
            report = {**report, "modules": {module["name"]: module for module in report["modules"]}}
        return from_json(LayerReport, report, self.folder, "discard that run with --force")

    def source(self, unit: Unit) -> WeightSource:
        """Weights of a finished unit, read from its shard."""
        return self.model.layout.saved(self.shard(unit))

    def resident(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has the weights through which calibration text is propagated."""
        return self.model.resident(unit) if self.propagate_dense else self.pruned(unit)

    def original(self, unit: Unit) -> AbstractContextManager[None]:
        """Context, inside :meth:`resident`, in which a finished unit has its original weights."""
        return self.model.original(unit, from_first(self.ranks, self.source(unit)))

    def pruned(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has its pruned weights if it is finished, otherwise its original ones."""
        return self.model.resident(unit, from_first(self.ranks, self.source(unit)) if self.done(unit) else None)

    def keep(self, unit: Unit, report: LayerReport | None = None) -> None:
        """Save a unit as it is in memory now, and record it in the journal unless the model is pruned as a whole.

        Raises
        ------
        NeuronRankError
            If writing fails.
        """
        self._write(unit)
        if not self._at_once:
            self.journal.finish(self.shard(unit), None if report is None else asdict(report))

    def ratios(self) -> list[float] | None:
        """Sparsity ratios of the layers; None if they have not been computed."""
        return self.journal.ratios

    def keep_ratios(self, ratios: list[float]) -> None:
        """Record the ratios in the journal: they cannot be computed again once layers are pruned."""
        self.journal.allocate(ratios)

    def measured(self, name: str, measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """A measurement from the journal; if it has none of this name, measure and record it."""
        if name not in self.journal.measured and (found := measure()) is not None:
            self.journal.measure(name, found)
        return self.journal.measured.get(name)

    def notes(self) -> list[str]:
        """What the result of a run says about the tensors of the source."""
        return self.names.notes()

    def _write(self, unit: Unit) -> None:
        with self.saving():
            tensors = self.model.layout.as_stored(self.model.tensors(unit))
            if unit == REST:
                tensors |= self.names.copies()
            write_durably(self.shard(unit), lambda path: write_shard(tensors, path))

    def complete(self, tokenizer: Any) -> Path:
        """Write everything but the result, and return the folder in which it is; raises NeuronRankError on failure."""
        model = self.model.model
        with self.saving():
            self._write(REST)
            if HEAD in self.model.units and not self.done(HEAD):
                with self.model.resident(HEAD):
                    self._write(HEAD)
            shards = [self.shard(unit) for unit in self.model.units]
            self.names.check(self.model, shards)
            (join_shards if self._join else write_index)(shards, self.output)
            with quiet_transformers():
                # As ``model.save_pretrained`` does, which needs all weights in memory.
                model.config.architectures = [type(model).__name__]
                model.config.dtype = model.dtype
                if self.smaller:
                    forget_predictors(model.config)
                model.config.save_pretrained(self.output)
                add_older_keys(model.config, self.output / CONFIG_NAME)
                if model.can_generate():
                    model.generation_config.save_pretrained(self.output)
                tokenizer.save_pretrained(self.output)
                rename_tokenizer(tokenizer, self.output / TOKENIZER_CONFIG_FILE)
        return self.output

    def finish(self, report: dict[str, Any], texts: Mapping[str, str] | None = None) -> None:
        """Give the completed model the output's name.

        Parameters
        ----------
        report : dict
            Content of ``neuronrank.json``: settings and figures of the run. Strings as keys, no NaN.
        texts : dict of str, optional
            Content of more files, by name.

        Raises
        ------
        NeuronRankError
            If writing fails, or the output has come into existence meanwhile and must not be replaced.
        ValueError, TypeError
            If the report cannot be written as JSON.
        """
        file = self.output / REPORT_NAME
        with self.saving():
            for name, text in (texts or {}).items():
                (self.output / name).write_text(text, encoding="utf-8")
            write_json(file, report)
            self.publish(file)
