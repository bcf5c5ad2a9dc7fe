"""Where a run finds the weights of the unit at work, and what becomes of them afterwards."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from neuronrank_torch.calibration.hidden_states import in_memory
from neuronrank_torch.model.streaming import Unit
from neuronrank_torch.pruning.result import LayerReport


class LayerStore(Protocol):
    """What pruning asks of the place where weights are kept: memory, or the folder that a run writes."""

    def resident(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has its weights."""
        ...

    def done(self, unit: Unit) -> bool:
        """Whether a unit was finished by an earlier process, so that text has only to be propagated through it."""
        ...

    def report(self, unit: Unit) -> LayerReport | None:
        """What was done to a finished unit; None where it was left alone."""
        ...

    def keep(self, unit: Unit, report: LayerReport | None) -> None:
        """Called inside :meth:`resident` when a unit is finished."""
        ...

    def ratios(self) -> list[float] | None:
        """Sparsity ratios of the layers that an earlier process computed."""
        ...

    def keep_ratios(self, ratios: list[float]) -> None:
        """Called once they are computed, before the first layer is pruned."""
        ...

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory for hidden states of this shape, with the precision of ``like``."""
        ...


class InMemory:
    """All weights in memory, where they stay."""

    def resident(self, unit: Unit) -> AbstractContextManager[None]:
        """See :class:`LayerStore`."""
        del unit
        return nullcontext()

    def done(self, unit: Unit) -> bool:
        """Nothing is."""
        del unit
        return False

    def report(self, unit: Unit) -> LayerReport | None:
        """Never asked for, since nothing is done."""
        raise KeyError(unit)

    def keep(self, unit: Unit, report: LayerReport | None) -> None:
        """Nothing to do."""

    def ratios(self) -> list[float] | None:
        """None are."""
        return None

    def keep_ratios(self, ratios: list[float]) -> None:
        """Nothing to do."""

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory on the device of ``like``."""
        return in_memory(shape, like)
