"""Writes a statistics folder table by table; it has its name when it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neuronrank_core import LayerStatistics, save_statistics
from neuronrank_torch.checkpoint import STATISTICS, write_durably
from neuronrank_torch.follower import Opened
from neuronrank_torch.partial import PartialFolder
from neuronrank_torch.ranks import ALONE, Ranks
from neuronrank_torch.sealed import seal
from neuronrank_torch.statistics_folder import file_name
from neuronrank_torch.streamed_model import HEAD, Unit


class StatisticsWriter(PartialFolder):
    """See :class:`neuronrank_torch.partial.PartialFolder`; ``ranks`` as for the staging folder of a prune."""

    inner = "statistics"
    kind = STATISTICS

    def __init__(
        self, target: Path, identity: dict[str, Any], layers: int, *, ranks: Ranks = ALONE, **options: Any
    ) -> None:
        super().__init__(target, identity, layers, **options)
        self.ranks = ranks

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
