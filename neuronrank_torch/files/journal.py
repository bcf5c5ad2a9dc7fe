"""The progress of a run on disk: which run it is, and which parts of its result are finished."""

import json
from pathlib import Path
from typing import Any

from neuronrank_core.errors import InputError
from neuronrank_torch.files.durable import write_durably
from neuronrank_torch.files.json import read_sealed, write_json

#: Increases when journals, searches and sweeps written so far can no longer be resumed from.
JOURNAL_FORMAT = 5
#: Differences between two runs that an error names.
_SHOWN = 3


class Journal:
    """The journal of one run. Every change is on disk when the call returns.

    Parameters
    ----------
    file : pathlib.Path
        The journal file. If it exists, its content is loaded.
    identity : dict
        Everything that the result depends on, in JSON types.

    Attributes
    ----------
    shards : dict
        Size in bytes of each finished shard, by file name.
    reports : dict
        Changes to the tensors of each finished shard, by file name; None for a shard without changes.
    measured : dict
        Perplexities and KL divergences by the name of the measurement.
    ratios : list of float or None
        Sparsity ratio of each pruned layer, if they differ.

    Raises
    ------
    InputError
        If the file is the journal of another run, or damaged.
    """

    def __init__(self, file: Path, identity: dict[str, Any]) -> None:
        self.file = file
        self.identity = json.loads(json.dumps(identity))
        self.shards: dict[str, int] = {}
        self.reports: dict[str, dict[str, Any] | None] = {}
        self.measured: dict[str, dict[str, Any]] = {}
        self.ratios: list[float] | None = None
        if not file.exists():
            return
        stored = read_sealed(file, "discard that run with --force")
        changes = differences(stored["identity"], self.identity)
        if changes:
            raise InputError(
                f"an unfinished run for this output differs from this one: {'; '.join(changes[:_SHOWN])}",
                hint="repeat its command to resume it, or discard it with --force",
            )
        vars(self).update(stored)

    def finish(self, shard: Path, report: dict[str, Any] | None) -> None:
        """Record that a shard is finished."""
        self.shards[shard.name] = shard.stat().st_size
        self.reports[shard.name] = report
        self._write()

    def measure(self, name: str, found: dict[str, Any]) -> None:
        """Record a measurement: a perplexity or a KL divergence."""
        self.measured[name] = found
        self._write()

    def allocate(self, ratios: list[float]) -> None:
        """Record the sparsity ratios of the layers."""
        self.ratios = ratios
        self._write()

    def _write(self) -> None:
        content = {name: value for name, value in vars(self).items() if name != "file"}
        write_durably(self.file, lambda path: write_json(path, content, checksum=True))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe the differences between two nested dictionaries, one phrase per value, in the order of ``now``."""
    old, new = _leaves(before), _leaves(now)
    return [
        f"{name} was {old.get(name, 'absent')}, is {new.get(name, 'absent')}"
        for name in dict.fromkeys([*new, *old])
        if old.get(name) != new.get(name)
    ]


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The values in nested dictionaries, by the keys that lead to them."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for inner, it in value.items() for key, leaf in _leaves(it, f"{name} {inner}".strip()).items()}
