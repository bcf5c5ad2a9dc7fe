"""A folder of statistics that ``neuronrank collect`` wrote: one table for each layer, and what they were made of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuronrank_core import InputError, InvalidValueError, LayerStatistics, Recipe, load_statistics
from neuronrank_core.methods import check_recipe, without_effect
from neuronrank_core.statistics.table_files import FORMAT_VERSION, KINDS
from neuronrank_torch.files.durable import STATISTICS
from neuronrank_torch.files.journal import differences
from neuronrank_torch.files.json import read_json, read_sealed
from neuronrank_torch.model.source import ModelSource
from neuronrank_torch.model.streaming import Unit

#: Settings that the tables were collected with and no recipe can change afterwards.
_FIXED = ("signal", "threshold", "tokens_per_document")


class StatisticsFolder:
    """Statistics of one model on one text; tables are read when they are asked for.

    Parameters
    ----------
    path : str or pathlib.Path

    Attributes
    ----------
    header : dict
        What ``statistics.json`` says: ``format``, ``model``, ``fingerprint`` (as
        :meth:`neuronrank_torch.model.source.ModelSource.digests` gives it), ``model_type``, ``layers``, ``dataset``,
        ``text_sha256``, ``nsamples``, ``seqlen``, ``seed``, ``bos``, ``signal``, ``threshold``,
        ``tokens_per_document``, ``batch_size``, ``documents`` (numbers in the whole draw of ``nsamples``, ascending),
        ``dtype``, ``versions``.

    Raises
    ------
    InputError
        If there is no such folder, or it was written by a newer version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.header: dict[str, Any] = _read_header(self.path)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.header["layers"])

    @property
    def units(self) -> list[Unit]:
        """What there are tables of: the layers, and the head where it has a weight of its own."""
        head = "lm_head"
        return [*range(self.layers), *([head] if (self.path / file_name(head)).exists() else [])]

    def table(self, unit: Unit, kinds: Collection[str] = KINDS) -> LayerStatistics:
        """Read the table of a layer, by its number, or of the ``lm_head``.

        Parameters
        ----------
        unit : int or str
        kinds : collection of str
            See :func:`neuronrank_core.load_statistics`.

        Raises
        ------
        InputError
            If the file cannot be read, or is of other documents.
        """
        file = self.path / file_name(unit)
        table, _ = load_statistics(file, kinds)
        if table.document.tolist() != self.header["documents"]:
            raise InputError(f"{file} is not of the documents that {STATISTICS.header} lists", hint="collect again")
        return table

    def check_model(self, source: ModelSource) -> None:
        """Refuse another model than the one that the statistics are of.

        Raises
        ------
        InputError
            Says what differs.
        """
        theirs = {"model_type": self.header["model_type"], "file": self.header["fingerprint"]}
        changes = differences(theirs, {"model_type": source.model_type, "file": source.digests()})
        if changes:
            raise InputError(
                f"{self.path} holds statistics of another model ({self.header['model']}): {changes[0]}",
                hint="collect statistics of this model",
            )

    def check_layers(self, layers: int) -> None:
        """Refuse a model of another depth; raises InputError."""
        if layers != self.layers:
            raise InputError(
                f"{self.path} holds statistics of {self.layers} layers, but the model has {layers}",
                hint="collect statistics of this model",
            )

    def fitted(self, recipe: Recipe) -> Recipe:
        """The recipe with what these statistics decide: documents, their length, and dense propagation.

        Raises
        ------
        InvalidValueError
            If the recipe reads a signal, threshold or sample that was not collected.
        InputError
            If it needs the text itself.
        """
        if recipe.update != "none":
            raise InputError(
                f"--update {recipe.update} needs calibration text, which statistics do not replace",
                hint="leave out --update, or prune without --stats",
            )
        for name in _FIXED:
            collected = self.header[name]
            if not without_effect(recipe, {name}) and getattr(recipe, name) != collected:
                raise InvalidValueError(
                    name,
                    getattr(recipe, name),
                    f"{collected}, which {self.path} was collected with",
                    hint=f"set it to {collected}, or collect again",
                )
        fitted = replace(
            recipe,
            propagate="dense",
            nsamples=len(self.header["documents"]),
            seqlen=self.header["seqlen"],
            bos=self.header["bos"],
        )
        check_recipe(fitted)
        return fitted

    def calibration(self) -> dict[str, Any]:
        """What a report says of the text behind the statistics."""
        return {
            "statistics": str(self.path),
            "dataset": self.header["dataset"],
            "text_sha256": self.header["text_sha256"],
            "tokens": len(self.header["documents"]) * self.header["seqlen"],
        }


def file_name(unit: Unit) -> str:
    """Name of the file that holds the table of a layer or of the head."""
    return f"layer-{unit:05d}.safetensors" if isinstance(unit, int) else f"{unit}.safetensors"


def _read_header(folder: Path) -> dict[str, Any]:
    file = folder / STATISTICS.header
    if not file.is_file():
        raise InputError(
            f"{folder} is no statistics folder: it has no {STATISTICS.header}",
            hint="name a folder that `neuronrank collect --save` wrote",
        )
    # A newer version may seal in another way.
    version = read_json(file, hint="collect again").get("format")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise InputError(f"{folder} has format {version}, newer than {FORMAT_VERSION}", hint="upgrade neuronrank")
    return read_sealed(file, "collect again")
