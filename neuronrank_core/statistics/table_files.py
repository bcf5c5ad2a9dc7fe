"""Statistics on disk, as safetensors files."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from neuronrank_core.errors import InputError
from neuronrank_core.statistics.table import EXPERTS, INPUTS, RESIDUAL, SAMPLE, SIGNAL, LayerStatistics

#: Incremented when the format changes incompatibly.
FORMAT_VERSION = 1
#: Prefixes of the column names of each kind.
_COLUMNS = {
    INPUTS: ("input_mean_square.",),
    SIGNAL: ("signal_", "open_gate"),
    SAMPLE: ("sample",),
    RESIDUAL: ("residual_norm", "error_gain"),
    EXPERTS: ("expert_",),
}
KINDS = tuple(_COLUMNS)


def save_statistics(path: Path | str, table: LayerStatistics, header: Mapping[str, Any] | None = None) -> None:
    """Write one layer's table.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file; overwritten.
    table : LayerStatistics
    header : dict, optional
        JSON-serialisable metadata: the model, the text, the sampling.
    """
    metadata = {"format": str(FORMAT_VERSION)}
    if header:  # Without a header there is one metadata entry, so equal tables give equal files.
        metadata["header"] = json.dumps(dict(header), sort_keys=True)
    columns = {name: np.ascontiguousarray(column) for name, column in table.columns().items()}
    save_file(columns, str(path), metadata=metadata)


def load_statistics(path: Path | str, kinds: Collection[str] = KINDS) -> tuple[LayerStatistics, dict[str, Any]]:
    """Read a table and its header.

    Parameters
    ----------
    path : path
    kinds : collection of str
        Kinds of statistics to read (:mod:`neuronrank_core.methods.base`); other columns are not loaded.

    Raises
    ------
    InputError
        If the file is missing, is not a statistics table, or was written by a newer version.
    """
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            if "format" not in metadata:
                raise InputError("not a statistics table")
            if int(metadata["format"]) > FORMAT_VERSION:
                raise InputError(
                    f"its format {metadata['format']} is newer than {FORMAT_VERSION}",
                    hint="upgrade neuronrank",
                )
            left = tuple(start for kind in _COLUMNS.keys() - set(kinds) for start in _COLUMNS[kind])
            names = [name for name in file.keys() if not name.startswith(left)]  # noqa: SIM118 (no mapping)
            columns = {name: file.get_tensor(name) for name in names}
            return LayerStatistics.from_columns(columns), json.loads(metadata.get("header", "{}"))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        hint = (error.hint if isinstance(error, InputError) else "") or "the file is missing or damaged: collect again"
        raise InputError(f"cannot read statistics from {path}: {error}", hint=hint) from error
