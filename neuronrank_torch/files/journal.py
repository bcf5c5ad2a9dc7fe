"""What a run has done so far, on disk: which run it is, and which parts of its result are finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neuronrank_core.errors import InputError
from neuronrank_torch.files.durable import write_durably
from neuronrank_torch.files.json import read_sealed, seal

#: Changes when a journal of before can no longer be taken over.
JOURNAL_FORMAT = 2
#: Differences between two runs that an error names.
_SHOWN = 3


class Journal:
    """The journal of one run; every change is durable when the call returns.

    Parameters
    ----------
    file : pathlib.Path
        Where it is. What another process has written there is taken over.
    identity : dict
        What the result depends on, in JSON types.

    Attributes
    ----------
    shards : dict
        Size in bytes by file name, of the shards that are finished.
    reports : dict
        What was done to the tensors of a shard, by its name; None where they were left alone.
    measured : dict
        Perplexities by what was measured.
    ratios : list of float or None
        Sparsity ratio of each pruned layer, where they differ.

    Raises
    ------
    InputError
        If the journal there is of another run, or damaged.
    """

    def __init__(self, file: Path, identity: dict[str, Any]) -> None:
        self.file = file
        self.identity = json.loads(json.dumps(identity))
        self.shards: dict[str, int] = {}
        self.reports: dict[str, dict[str, Any] | None] = {}
        self.measured: dict[str, dict[str, Any]] = {}
        self.ratios: list[float] | None = None
        if file.exists():
            self._take_over()

    def _take_over(self) -> None:
        there = read_sealed(self.file, "discard that run with --force")
        changes = differences(there["identity"], self.identity)
        if changes:
            raise InputError(
                f"an unfinished run for this output differs from this one: {'; '.join(changes[:_SHOWN])}",
                hint="repeat its command to go on with it, or discard it with --force",
            )
        self.shards, self.reports = there["shards"], there["reports"]
        self.measured, self.ratios = there["measured"], there["ratios"]

    def finish(self, shard: Path, report: dict[str, Any] | None) -> None:
        """Note that a shard is finished."""
        self.shards[shard.name] = shard.stat().st_size
        self.reports[shard.name] = report
        self._write()

    def measure(self, what: str, perplexity: dict[str, Any]) -> None:
        """Note a perplexity."""
        self.measured[what] = perplexity
        self._write()

    def allocated(self, ratios: list[float]) -> None:
        """Note the sparsity ratios of the layers."""
        self.ratios = ratios
        self._write()

    def _write(self) -> None:
        content = {
            "identity": self.identity,
            "shards": self.shards,
            "reports": self.reports,
            "measured": self.measured,
            "ratios": self.ratios,
        }
        text = json.dumps(seal(content), indent=2)
        write_durably(self.file, lambda path: path.write_text(text, encoding="utf-8"))


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Say in a few words each what differs between the identities of two runs."""
    old, new = _leaves(there), _leaves(here)
    return [
        f"{name} was {old.get(name, 'not there')}, is {new.get(name, 'not there')}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The values in nested dictionaries, by the keys that lead to them."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for inner, it in value.items() for key, leaf in _leaves(it, f"{name} {inner}".strip()).items()}
