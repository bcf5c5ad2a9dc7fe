"""A model in memory saved through the staging folder, as a run that prunes it would."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer

from neuronrank_torch.files.durable import check_output
from neuronrank_torch.model.streaming import REST, StreamedModel
from neuronrank_torch.model.weights import LoadedWeights
from neuronrank_torch.saving.model_writer import ModelWriter


def staging(model: Any, target: Path, identity: dict[str, Any] | None = None, **options: Any) -> ModelWriter:
    """The staging folder of a copy of a model."""
    model = copy.deepcopy(model)
    return ModelWriter(
        target, StreamedModel(model, LoadedWeights(model), torch.device("cpu")), identity or {}, **options
    )


def keep_all(stage: ModelWriter) -> None:
    """Finish every unit, as it is."""
    for unit in stage.model.units:
        if unit != REST:
            with stage.resident(unit):
                stage.keep(unit)


def interrupted(model: Any, target: Path, reports: dict[Any, Any], **options: Any) -> ModelWriter:
    """A run that was stopped when it had finished some units."""
    stage = staging(model, target, **options)
    with suppress(KeyboardInterrupt), stage:
        for unit, report in reports.items():
            with stage.resident(unit):
                stage.keep(unit, report)
        raise KeyboardInterrupt
    return stage


def save_model(
    model: Any, tokenizer: Any, path: Path, *, report: dict[str, Any] | None = None, force: bool = False
) -> Path:
    """Save a model as it is."""
    target = check_output(path, force)
    with staging(model, target, force=force) as stage:
        keep_all(stage)
        stage.complete(tokenizer or tiny_tokenizer())
        stage.finish(report or {})
    return target
