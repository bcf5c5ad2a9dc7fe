"""Where a run finds the weights of the unit at work, and what becomes of them afterwards."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from neuronrank_torch.calibration.hidden_states import in_memory
from neuronrank_torch.model.streaming import Unit
from neuronrank_torch.pruning.result import LayerReport


class LayerStore:
    """All weights in memory; :class:`neuronrank_torch.saving.model_writer.ModelWriter` has them on disk."""

    def resident(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has its weights."""
        del unit
        return nullcontext()

    def done(self, unit: Unit) -> bool:
        """Whether a unit was finished by an earlier process, so that text has only to be propagated through it."""
        del unit
        return False

    def report(self, unit: Unit) -> LayerReport | None:
        """What was done to a finished unit; None where it was left alone."""
        raise KeyError(unit)

    def keep(self, unit: Unit, report: LayerReport | None) -> None:
        """Called inside :meth:`resident` when a unit is finished."""

    def ratios(self) -> list[float] | None:
        """Sparsity ratios of the layers that an earlier process worked out."""
        return None

    def keep_ratios(self, ratios: list[float]) -> None:
        """Called once they are worked out, before the first layer is pruned."""

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room for hidden states."""
        return in_memory(shape, like)
