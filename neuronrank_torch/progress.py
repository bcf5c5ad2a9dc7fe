"""The one progress callback, which every long call takes as ``progress`` and hands down unchanged."""

from __future__ import annotations

from collections.abc import Callable

#: Called with the stage in words ("calibrating layer 3 of 30"), steps done, steps in all, and the unit of a step.
Progress = Callable[[str, int, int, str], None]


def silent(stage: str, done: int, total: int, unit: str) -> None:
    """Show nothing: the default."""
    del stage, done, total, unit
