"""Storage of the weights of units (layers, head) before and after they are processed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from neuronrank_torch.calibration.hidden_states import in_memory
from neuronrank_torch.model.streaming import Unit
from neuronrank_torch.pruning.result import LayerReport

#: Returns a measurement from an earlier process by its name, or measures.
Measured = Callable[[str, Callable[[], dict[str, Any] | None]], dict[str, Any] | None]


def always_measured(name: str, measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Measure: there is no earlier process."""
    del name
    return measure()


class LayerStore(Protocol):
    """Interface to the storage of weights: memory, or the folder that a run writes."""

    def resident(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which the weights of a unit are loaded."""
        ...

    def original(self, unit: Unit) -> AbstractContextManager[None]:
        """Context, inside :meth:`resident`, in which a finished unit has its original weights."""
        ...

    def done(self, unit: Unit) -> bool:
        """Whether an earlier process finished a unit, so that text only needs to be propagated through it."""
        ...

    def report(self, unit: Unit) -> LayerReport | None:
        """Report of a finished unit; None if it was not pruned."""
        ...

    def keep(self, unit: Unit, report: LayerReport | None) -> None:
        """Called inside :meth:`resident` when a unit is finished."""
        ...

    def ratios(self) -> list[float] | None:
        """Sparsity ratios of the layers, if an earlier process computed them."""
        ...

    def keep_ratios(self, ratios: list[float]) -> None:
        """Save the sparsity ratios; called once, before the first layer is pruned."""
        ...

    def measured(self, name: str, measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """See :data:`Measured`."""
        ...

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Allocate hidden states of this shape, with the precision of ``like``."""
        ...


class InMemory:
    """Keeps all weights in memory.

    Parameters
    ----------
    measured : callable
        See :data:`Measured`.
    """

    def __init__(self, measured: Measured = always_measured) -> None:
        self._measured = measured

    def measured(self, name: str, measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """See :class:`LayerStore`."""
        return self._measured(name, measure)

    def resident(self, unit: Unit) -> AbstractContextManager[None]:
        """See :class:`LayerStore`."""
        del unit
        return nullcontext()

    def original(self, unit: Unit) -> AbstractContextManager[None]:
        """Never called, because no unit is done."""
        raise KeyError(unit)

    def done(self, unit: Unit) -> bool:
        """Return False: nothing is stored."""
        del unit
        return False

    def report(self, unit: Unit) -> LayerReport | None:
        """Never called, because no unit is done."""
        raise KeyError(unit)

    def keep(self, unit: Unit, report: LayerReport | None) -> None:
        """Do nothing."""

    def ratios(self) -> list[float] | None:
        """Return None: nothing is stored."""
        return None

    def keep_ratios(self, ratios: list[float]) -> None:
        """Do nothing."""

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Allocate on the device of ``like``."""
        return in_memory(shape, like)
