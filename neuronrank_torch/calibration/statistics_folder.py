"""A statistics folder written by ``neuronrank collect``: one table per layer, and the settings of the collection."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuronrank_core import InputError, InvalidValueError, LayerStatistics, Recipe, load_statistics
from neuronrank_core.methods import check_recipe, without_effect
from neuronrank_core.selection.allocation import typical_gain
from neuronrank_core.statistics.table import RESIDUAL
from neuronrank_core.statistics.table_files import FORMAT_VERSION, KINDS
from neuronrank_torch.files.durable import STATISTICS
from neuronrank_torch.files.journal import differences
from neuronrank_torch.files.json import read_json, read_sealed
from neuronrank_torch.model.source import ModelSource
from neuronrank_torch.model.streaming import HEAD, Unit
from neuronrank_torch.paths import local_path
from neuronrank_torch.text.sources import SELF, SELF_FILE

#: Settings of the collection that a recipe cannot change afterwards.
_FIXED = ("signal", "threshold", "tokens_per_document")


class StatisticsFolder:
    """Statistics of one model on one text; tables are read on request.

    Parameters
    ----------
    path : str or pathlib.Path

    Attributes
    ----------
    header : dict
        Content of ``statistics.json``: ``format``, ``model``, ``fingerprint`` (from
        :meth:`neuronrank_torch.model.source.ModelSource.digests`), ``model_type``, ``layers``, ``gated``, ``dataset``,
        ``text_sha256``, ``nsamples``, ``seqlen``, ``seed``, ``bos``, ``signal``, ``threshold``,
        ``tokens_per_document``, ``experts``, ``batch_size``, ``documents`` (indices among all ``nsamples`` documents,
        ascending), ``dtype``, ``versions``.

    Raises
    ------
    InputError
        If the folder does not exist, or was written by a newer version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = local_path(path)
        self.header: dict[str, Any] = _read_header(self.path)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.header["layers"])

    @property
    def experts(self) -> bool:
        """Whether the tables are those of the experts of a mixture."""
        return bool(self.header.get("experts", False))

    @property
    def fixed(self) -> dict[str, Any]:
        """Fields of a recipe that cannot be changed after the collection."""
        return {name: self.header[name] for name in _FIXED}

    @property
    def dataset(self) -> str:
        """The text, as it was named; where the model wrote it, the file in this folder."""
        named: str = self.header["dataset"]
        return str(self.path / SELF_FILE) if named == SELF else named

    @property
    def units(self) -> list[Unit]:
        """Units that have a table: the layers, and the head if its weight is not tied."""
        return [*range(self.layers), *([HEAD] if (self.path / file_name(HEAD)).exists() else [])]

    def table(self, unit: Unit, kinds: Collection[str] = KINDS) -> LayerStatistics:
        """Read the table of a layer, by its index, or of the ``lm_head``.

        Parameters
        ----------
        unit : int or str
        kinds : collection of str
            See :func:`neuronrank_core.load_statistics`.

        Raises
        ------
        InputError
            If the file cannot be read, or covers other documents than the header lists.
        """
        file = self.path / file_name(unit)
        table, _ = load_statistics(file, kinds)
        if table.document.tolist() != self.header["documents"]:
            raise InputError(f"{file} does not match the documents in {STATISTICS.header}", hint="collect again")
        return table

    def check_model(self, source: ModelSource) -> None:
        """Check that the statistics belong to this model.

        Raises
        ------
        InputError
            If they do not; states the first difference.
        """
        theirs = {"model_type": self.header["model_type"], "file": self.header["fingerprint"]}
        changes = differences(theirs, {"model_type": source.model_type, "file": source.digests()})
        if changes:
            raise InputError(
                f"{self.path} holds statistics of another model ({self.header['model']}): {changes[0]}",
                hint="collect statistics of this model",
            )

    def check_layers(self, layers: int) -> None:
        """Raise InputError if the model has another number of layers."""
        if layers != self.layers:
            raise InputError(
                f"{self.path} holds statistics of {self.layers} layers, but the model has {layers}",
                hint="collect statistics of this model",
            )

    def fitted(self, recipe: Recipe) -> Recipe:
        """The recipe with the settings that these statistics fix: documents, their length, and dense propagation.

        Raises
        ------
        InvalidValueError
            If the recipe needs another signal, threshold or sample than was collected.
        InputError
            If it needs the calibration text.
        """
        if recipe.update != "none":
            raise InputError(
                f"--update {recipe.update} needs calibration text, not only statistics",
                hint="leave out --update, or prune without --stats",
            )
        terms = "experts" if self.experts else "neurons"
        if recipe.removes_heads or recipe.removes_layers or recipe.removes_experts != self.experts:
            raise InputError(
                f"--sparsity_type {recipe.sparsity_type} needs calibration text: statistics are those of {terms}",
                hint="prune without --stats",
            )
        if not self.header.get("gated", True) and not self.experts:  # There is no other signal.
            recipe = replace(recipe, signal=self.header["signal"])
        for name, collected in self.unlike(recipe).items():
            raise InvalidValueError(
                name,
                getattr(recipe, name),
                f"{collected}, which {self.path} was collected with",
                hint=f"set it to {collected}, or collect again",
            )
        fitted = replace(
            recipe,
            propagate=recipe.propagate if self.experts else "dense",
            nsamples=len(self.header["documents"]),
            seqlen=self.header["seqlen"],
            bos=self.header["bos"],
        )
        check_recipe(fitted)
        if fitted.differs_by_layer:
            typical_gain(self.table(0, {RESIDUAL}).require("error_gain", 0), 0)
        return fitted

    def unlike(self, recipe: Recipe) -> dict[str, Any]:
        """The settings of the collection that the recipe's method reads and that differ from the recipe's."""
        return {
            name: collected
            for name, collected in self.fixed.items()
            if not (self.experts and name == "signal")  # A table of experts has all.
            and not without_effect(recipe, {name})
            and getattr(recipe, name) != collected
        }

    def calibration(self) -> dict[str, Any]:
        """Calibration entry of a report: the text that the statistics were collected on."""
        return {
            "statistics": str(self.path),
            "dataset": self.header["dataset"],
            "text_sha256": self.header["text_sha256"],
            "tokens": len(self.header["documents"]) * self.header["seqlen"],
        }


def file_name(unit: Unit) -> str:
    """File name of the table of a layer or the head."""
    return f"layer-{unit:05d}.safetensors" if isinstance(unit, int) else f"{unit}.safetensors"


def _read_header(folder: Path) -> dict[str, Any]:
    file = folder / STATISTICS.header
    if not file.is_file():
        raise InputError(
            f"{folder} is not a statistics folder: it has no {STATISTICS.header}",
            hint="use a folder written by `neuronrank collect --save`",
        )
    # Check the version first: a newer one may use another checksum.
    version = read_json(file, hint="collect again").get("format")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise InputError(f"{folder} has format {version}, newer than {FORMAT_VERSION}", hint="upgrade neuronrank")
    return read_sealed(file, "collect again")
