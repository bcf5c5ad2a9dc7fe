"""The output as seen by the ranks that do not write it: only the first rank writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from neuronrank_torch.calibration.hidden_states import HiddenStates, in_file, in_memory
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.model.streaming import StreamedModel, Unit
from neuronrank_torch.model.weights import from_first
from neuronrank_torch.pruning.store import LayerStore


@dataclass(frozen=True)
class Opened:
    """What an earlier, interrupted run had finished, as the first rank found it in the folder.

    Parameters
    ----------
    shapes : dict
        Finished units. For each, the shapes of its tensors by name; None if they are unchanged.
    ratios : list of float or None
        Sparsity ratios of the layers, if they were computed.
    measured : dict
        Perplexities by the name of the measurement.
    """

    shapes: Mapping[Unit, dict[str, tuple[int, ...]] | None]
    ratios: list[float] | None = None
    measured: Mapping[str, dict[str, Any]] = field(default_factory=dict)


class Receiver(LayerStore):
    """The counterpart, on the other ranks, of the first rank's model writer or statistics writer.

    The ranks need no shared file system.

    Parameters
    ----------
    target : pathlib.Path
        The output folder. If hidden states are kept on disk, this rank's are beside it.
    model, propagate_dense, hidden_states
        See :class:`neuronrank_torch.saving.model_writer.ModelWriter`.
    ranks : Ranks
        The processes of the run, of which this is not the first.
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

    def __exit__(self, *raised: object) -> None:
        """Nothing to clean up."""

    def units_done(self) -> list[Unit]:
        """The finished units."""
        return self._done

    def done(self, unit: Unit) -> bool:
        """See :class:`LayerStore`."""
        return unit in self._done

    def report(self, unit: Unit) -> None:
        """None: only the first rank reports."""
        del unit

    def resident(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has the weights through which calibration text is propagated."""
        return self.model.resident(unit) if self.propagate_dense else self.pruned(unit)

    def original(self, unit: Unit) -> AbstractContextManager[None]:
        """Context, inside :meth:`resident`, in which a finished unit has its original weights."""
        return self.model.original(unit, from_first(self.ranks))

    def pruned(self, unit: Unit) -> AbstractContextManager[None]:
        """Context in which a unit has its pruned weights if it is finished, otherwise its original ones."""
        return self.model.resident(unit, from_first(self.ranks) if self.done(unit) else None)

    def keep(self, unit: Unit, report: object = None) -> None:
        """Record that a unit is finished; the first rank saves it."""
        del report
        self._done.append(unit)

    def ratios(self) -> list[float] | None:
        """See :class:`LayerStore`."""
        return self._opened.ratios

    def keep_ratios(self, ratios: list[float]) -> None:
        """Nothing to do: the first rank records the ratios."""

    def measured(self, name: str, measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """A perplexity that an earlier run measured; otherwise measure it."""
        return self._opened.measured.get(name) or measure()

    def own_text(self, write: object) -> list[str]:
        """The documents that the model wrote on the first rank."""
        del write
        return self.ranks.from_first(list)

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor for this rank's hidden states."""
        if self.hidden_states == "memory":
            return in_memory(shape, like)
        self.folder.mkdir(parents=True, exist_ok=True)
        mapped = in_file(self.folder / f"hidden-{self.ranks.rank}", shape, like)
        with suppress(OSError):  # Not empty if the first rank runs on this machine too.
            self.folder.rmdir()
        return mapped

    def notes(self) -> list[str]:
        """None: only the first rank reports."""
        return []

    def complete(self, tokenizer: object) -> None:
        """Nothing to do: the first rank writes."""

    def finish(self, *parts: object) -> None:
        """Nothing to do: the first rank completes the output."""
