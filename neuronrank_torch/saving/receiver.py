"""A folder that grows, as the ranks see it that do not write: a run that saves has one writer, the first rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from neuronrank_torch.calibration.hidden_states import HiddenStates, in_file, in_memory
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.model.streaming import StreamedModel, Unit
from neuronrank_torch.model.weights import FromFirst
from neuronrank_torch.pruning.result import LayerReport
from neuronrank_torch.pruning.store import LayerStore


@dataclass(frozen=True)
class Opened:
    """What the first rank found in the staging folder.

    Parameters
    ----------
    shapes : dict
        Of the tensors of each finished unit; None where the unit is as it was.
    ratios : list of float or None
        Of the layers, where they are worked out.
    measured : dict
        Perplexities by what was measured.
    """

    shapes: Mapping[Unit, dict[str, tuple[int, ...]] | None]
    ratios: list[float] | None = None
    measured: Mapping[str, dict[str, Any]] = field(default_factory=dict)


class Receiver(LayerStore):
    """The counterpart, on the other ranks, of the first rank's model writer or statistics writer.

    Needs no folder that both can see.

    Parameters
    ----------
    target : pathlib.Path
        The output folder; beside it are this rank's hidden states, where they are on disk.
    model, propagate_dense, hidden_states
        As for the staging folder.
    ranks : Ranks
        This one is not the first.
    """

    def __init__(
        self, target: Path, model: StreamedModel, *, propagate_dense: bool, hidden_states: HiddenStates, ranks: Ranks
    ) -> None:
        self.model, self.propagate_dense, self.hidden_states, self.ranks = model, propagate_dense, hidden_states, ranks
        self.folder = target.with_name(f".{target.name}.partial")

    def __enter__(self) -> Receiver:
        self._opened: Opened = self.ranks.from_first(lambda: Opened({}))
        self._done = list(self._opened.shapes)
        for unit, shapes in self._opened.shapes.items():
            if shapes is not None:
                self.model.reshape(unit, shapes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is left behind."""

    def units_done(self) -> list[Unit]:
        """The units that are finished."""
        return self._done

    def done(self, unit: Unit) -> bool:
        """See :class:`LayerStore`."""
        return unit in self._done

    def report(self, unit: Unit) -> LayerReport | None:
        """What was done is the first rank's to report."""
        del unit
        return None

    def resident(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has the weights to go on with."""
        return self.model.resident(unit) if self.propagate_dense else self.pruned(unit)

    def pruned(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has its pruned weights, if it is finished."""
        return self.model.resident(unit, FromFirst(self.ranks) if self.done(unit) else None)

    def keep(self, unit: Unit, report: object = None) -> None:
        """Note that a unit is finished; the first rank writes it."""
        del report
        self._done.append(unit)

    def ratios(self) -> list[float] | None:
        """See :class:`LayerStore`."""
        return self._opened.ratios

    def keep_ratios(self, ratios: list[float]) -> None:
        """The first rank makes them durable."""

    def measured(self, what: str, measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """A perplexity that was measured before, or is now."""
        return self._opened.measured.get(what) or measure()

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room for this rank's hidden states."""
        if self.hidden_states == "memory":
            return in_memory(shape, like)
        self.folder.mkdir(parents=True, exist_ok=True)
        mapped = in_file(self.folder / f"hidden-{self.ranks.rank}", shape, like)
        with suppress(OSError):  # The first rank's files are there, unless it is on another machine.
            self.folder.rmdir()
        return mapped

    def finish(self, *parts: object) -> None:
        """The first rank completes the output."""
