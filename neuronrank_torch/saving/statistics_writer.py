"""Writes a statistics folder, one table at a time. It gets its name when it is complete."""

from typing import Any

from neuronrank_core import LayerStatistics, save_statistics
from neuronrank_torch.calibration.statistics_folder import file_name
from neuronrank_torch.files.durable import STATISTICS, write_durably
from neuronrank_torch.files.json import write_json
from neuronrank_torch.model.streaming import HEAD, Unit
from neuronrank_torch.saving.output_writer import OutputWriter
from neuronrank_torch.saving.receiver import Opened


class StatisticsWriter(OutputWriter):
    """The output of a collection; see :class:`neuronrank_torch.saving.output_writer.OutputWriter`."""

    inner = "statistics"
    kind = STATISTICS

    def entered(self) -> None:
        """Tell the other ranks which units are finished."""
        done = filter(self.done, (*range(self.layers), HEAD))
        self.ranks.from_first(lambda: Opened(dict.fromkeys(done)))

    def done(self, unit: Unit) -> bool:
        """Whether this process or an earlier one saved the table of a unit."""
        return self.finished(self.output / file_name(unit))

    def keep(self, unit: Unit, table: LayerStatistics) -> None:
        """Save the table of a unit and record it in the journal.

        Raises
        ------
        NeuronRankError
            If writing fails.
        """
        file = self.output / file_name(unit)
        with self.saving():
            write_durably(file, lambda path: save_statistics(path, table))
        self.journal.finish(file, None)

    def finish(self, header: dict[str, Any]) -> None:
        """Write the header and give the folder its name.

        Parameters
        ----------
        header : dict
            Content of ``statistics.json``.

        Raises
        ------
        NeuronRankError
            If writing fails, or the output has come into existence meanwhile and must not be replaced.
        """
        file = self.output / STATISTICS.header
        with self.saving():
            write_json(file, header, checksum=True)
            self.publish(file)
