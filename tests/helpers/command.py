"""The command, run in this process or as one of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from neuronrank_torch.saving.model_writer import ModelWriter

#: Layers of the model that the tests of the command prune.
LAYERS = 4
Run = Callable[..., Result]
#: Seconds until a process that does not end fails a test.
LIMIT = 120
#: The program, after some code that interferes with it.
PROGRAM = "import signal, sys\n{0}\nfrom neuronrank_cli.app import main; sys.argv[0] = 'neuronrank'; main()"


def stop_after(monkeypatch: pytest.MonkeyPatch, units: int, error: BaseException) -> Callable[[], None]:
    """Have runs fail once so many units are finished; returns what lifts it."""
    keep = ModelWriter.keep
    kept = []

    def keep_and_stop(self: ModelWriter, unit: Any, report: Any = None) -> None:
        keep(self, unit, report)
        kept.append(unit)
        if len(kept) == units:
            raise error

    monkeypatch.setattr(ModelWriter, "keep", keep_and_stop)
    return lambda: monkeypatch.setattr(ModelWriter, "keep", keep)
