"""What becomes of the tensors of the source: every one is saved under its name, or a note says what is not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from neuronrank_core.errors import NeuronRankError
from neuronrank_torch.model.streaming import StreamedModel
from neuronrank_torch.model.tensor_files import read_header


@dataclass(frozen=True)
class Names:
    """Names of the tensors of a source.

    Parameters
    ----------
    written : frozenset of str
        Saved with the model, under their names.
    unused : list of str
        Not used by the model: copied as they are.
    renamed : list of str
        Part of the model, which saves them under the names that transformers gives them.
    """

    written: frozenset[str]
    unused: list[str]
    renamed: list[str]

    @classmethod
    def of(cls, model: StreamedModel) -> Names:
        """The names of a model's source."""
        written: set[str] = set()
        for unit in model.units:
            empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.tensors(unit).items()}
            written |= model.layout.as_stored(empty).keys()
        own = {name for names in model.units.values() for name in names}
        uses = model.layout.uses()
        left = sorted(uses.keys() - written)
        unused = [name for name in left if own.isdisjoint(uses[name])]
        renamed = [name for name in left if not own.isdisjoint(uses[name])]
        return cls(frozenset(written & uses.keys()), unused, renamed)

    def notes(self) -> list[str]:
        """What the result of a run says about them."""
        notes = []
        if self.unused:
            notes.append(f"tensors that the model does not use, copied unchanged: {_such_as(self.unused)}")
        if self.renamed:
            notes.append(f"tensors saved under transformers' names instead of the source's: {_such_as(self.renamed)}")
        return notes

    def check(self, shards: Iterable[Path]) -> None:
        """Refuse shards that lack a tensor of the source.

        Raises
        ------
        NeuronRankError
            Names one.
        """
        found = {name for shard in shards for name in read_header(shard)[0]}
        if lost := sorted({*self.written, *self.unused} - found):
            raise NeuronRankError(
                f"tensors of the source are not in the output: {_such_as(lost)}", hint="please report this as a bug"
            )


def _such_as(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
