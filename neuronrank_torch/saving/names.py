"""What becomes of the tensors of the source: every one is saved under its name, or a note says what is not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from neuronrank_core.errors import NeuronRankError
from neuronrank_torch.model.converted import ConvertedWeights
from neuronrank_torch.model.streaming import StreamedModel
from neuronrank_torch.model.tensor_files import read_header
from neuronrank_torch.model.weights import WeightSource


@dataclass(frozen=True)
class Names:
    """Names of the tensors of a source; none if it is not a folder.

    Parameters
    ----------
    source : WeightSource, optional
        Where they are.
    written : list of str
        Part of the model, saved under their names.
    unused : list of str
        Not used by the model: copied as they are.
    changed : list of str
        Part of the model, which saves them under other names or in another shape.
    dropped : list of str
        Not saved: of layers for multi-token prediction, which do not fit a smaller model.
    """

    source: WeightSource | None = None
    written: Sequence[str] = ()
    unused: Sequence[str] = ()
    changed: Sequence[str] = ()
    dropped: Sequence[str] = ()

    @classmethod
    def of(cls, model: StreamedModel, *, smaller: bool = False) -> Names:
        """Those of a model that is not pruned yet, and of which something will be removed if it becomes smaller."""
        layout = model.layout
        if not isinstance(layout, ConvertedWeights):
            return cls()
        saved = _saved(model)
        own = {name for names in model.units.values() for name in names}
        shapes, uses = layout.source.shapes(), layout.uses()
        written = [name for name in shapes if saved.get(name) == shapes[name]]
        unused = sorted(name for name in shapes.keys() - saved.keys() if own.isdisjoint(uses[name]))
        changed = sorted(shapes.keys() - {*written, *unused})
        depth = len(model.decoder.layers)
        dropped = [name for name in unused if smaller and _predicts_ahead(name, depth)]
        return cls(layout.source, written, [name for name in unused if name not in dropped], changed, dropped)

    def copies(self) -> dict[str, Tensor]:
        """The tensors that the model does not use."""
        return {} if self.source is None else {name: self.source.tensor(name) for name in self.unused}

    def notes(self) -> list[str]:
        """What the result of a run says about them."""
        notes = []
        if self.dropped:
            notes.append(
                "layers for multi-token prediction do not fit a smaller model, and are left out:"
                f" {_such_as(self.dropped)}"
            )
        if self.unused:
            notes.append(f"tensors that the model does not use, copied unchanged: {_such_as(self.unused)}")
        if self.changed:
            notes.append(f"tensors saved as transformers holds them, not as the source does: {_such_as(self.changed)}")
        return notes

    def left_out(self) -> list[str]:
        """What the result of a run says that saves only what the model uses."""
        notes = replace(self, unused=()).notes()
        lost = [f"tensors that the model does not use are left out: {_such_as(self.unused)}"] if self.unused else []
        return [*notes, *lost]

    def check(self, model: StreamedModel, shards: Iterable[Path]) -> None:
        """Refuse shards that lack a tensor of the source, unless it is one of an expert that the model lost.

        Raises
        ------
        NeuronRankError
            Names one.
        """
        found = {name for shard in shards for name in read_header(shard)[0]}
        lost = sorted({*self.written, *self.unused} - found)
        if lost and lost != sorted({*self.written} - _saved(model).keys()):
            raise NeuronRankError(
                f"tensors of the source are not in the output: {_such_as(lost)}", hint="please report this as a bug"
            )


def _saved(model: StreamedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a checkpoint that the model gives as it is now, by name."""
    saved: dict[str, tuple[int, ...]] = {}
    for unit in model.units:
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.tensors(unit).items()}
        saved |= {name: tuple(tensor.shape) for name, tensor in model.layout.as_stored(empty).items()}
    return saved


def _predicts_ahead(name: str, depth: int) -> bool:
    """Whether a tensor that the model does not use is of a layer for multi-token prediction."""
    number = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return "mtp" in re.split(r"[._]", name) or (number is not None and int(number[1]) >= depth)


def _such_as(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
