"""The progress callback: every long call takes it as ``progress`` and passes it on unchanged."""

from collections.abc import Callable

#: Called with (stage, done, total, unit) when a stage starts and whenever the run gets further in it. The stage says
#: what the run is doing, in words ("collecting layer 3 of 30"; layers are counted from 1); ``done`` of ``total`` steps
#: are finished, and the unit is what a step is ("windows"). A resumed run starts with the steps that earlier runs
#: finished. A total of 1 means that the stage has no steps.
Progress = Callable[[str, int, int, str], None]


def silent(stage: str, done: int, total: int, unit: str) -> None:
    """Report nothing: the default."""
    del stage, done, total, unit
