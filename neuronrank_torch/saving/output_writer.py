"""What the writers of a model and of statistics share: a resumable folder that also has room for hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from neuronrank_torch.calibration.hidden_states import HiddenStates, room
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.files.resumable import ResumableFolder


class OutputWriter(ResumableFolder):
    """The first rank's output folder while it is being written.

    Parameters
    ----------
    target, identity, layers, force
        See :class:`neuronrank_torch.files.resumable.ResumableFolder`.
    hidden_states : {"memory", "disk"}
        Where hidden states are kept. On disk, they are a memory-mapped file in the folder.
    ranks : Ranks
        The processes of the run. The others use :class:`neuronrank_torch.saving.receiver.Receiver`.
    """

    def __init__(
        self,
        target: Path,
        identity: dict[str, Any],
        layers: int,
        *,
        force: bool = False,
        hidden_states: HiddenStates = "memory",
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(target, identity, layers, force=force)
        self.hidden_states, self.ranks = hidden_states, ranks

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor for hidden states, with the precision and device of ``like`` if in memory.

        Raises
        ------
        NeuronRankError
            If the disk has no space for it.
        """
        with self.saving():
            return room(self.hidden_states, self.folder / "hidden", shape, like)
