"""Writes a statistics folder table by table; it has its name when it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from neuronrank_core import LayerStatistics, save_statistics
from neuronrank_torch.calibration.hidden_states import HiddenStates, room
from neuronrank_torch.calibration.statistics_folder import file_name
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.files.durable import STATISTICS, write_durably
from neuronrank_torch.files.json import seal
from neuronrank_torch.files.resumable import ResumableFolder
from neuronrank_torch.model.streaming import HEAD, Unit
from neuronrank_torch.saving.receiver import Opened


class StatisticsWriter(ResumableFolder):
    """See :class:`neuronrank_torch.files.resumable.ResumableFolder`.

    ``hidden_states`` and ``ranks`` are as for the folder of a prune.
    """

    inner = "statistics"
    kind = STATISTICS

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

    def entered(self) -> None:
        """Tell the other ranks what is finished."""
        done = filter(self.done, (*range(self.layers), HEAD))
        self.ranks.from_first(lambda: Opened(dict.fromkeys(done)))

    def done(self, unit: Unit) -> bool:
        """Whether a unit's table is on disk, by this process or one before."""
        return self.finished(self.output / file_name(unit))

    def keep(self, unit: Unit, table: LayerStatistics) -> None:
        """Make a unit's table durable."""
        file = self.output / file_name(unit)
        with self.saving():
            write_durably(file, lambda path: save_statistics(path, table))
        self.journal.finish(file, None)

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room for hidden states."""
        with self.saving():
            return room(self.hidden_states, self.folder / "hidden", shape, like)

    def finish(self, header: dict[str, Any]) -> Path:
        """Write the header and give the folder its name.

        Raises
        ------
        NeuronRankError
            If writing fails.
        """
        file = self.output / STATISTICS.header
        text = json.dumps(seal(header), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        with self.saving():
            file.write_text(text, encoding="utf-8")
            self.hand_over(file)
        return self.target
