"""What the rows of docs/faults.md have in common: how a refusal looks, and that it changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from command import Run
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_files import write_model


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, and what is in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def weights_and_settings(folder: Path) -> dict[str, bytes]:
    """Every file of an output but those that record the run itself: its command and its time."""
    return {name: content for name, content in tree(folder).items() if name not in ("neuronrank.json", "README.md")}


def refused(run: Run, *arguments: object, code: int, says: str, hint: str = "") -> str:
    """Run a command that fails: one line with ``says``, one hint, an exit code, and nothing lost or half-written.

    ``hint`` is a word of the hint. Returns what was on stderr.
    """
    here = Path.cwd()
    before, names = tree(here), sorted(here.iterdir())
    result = run(*arguments, code=code)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    hints = [line for line in lines if line.startswith(("Hint: ", "Try 'neuronrank "))]
    assert len(errors) == 1, result.stderr
    assert len(hints) == 1, result.stderr
    assert says in errors[0], result.stderr
    assert hint in hints[0], result.stderr
    assert "unexpected error" not in hints[0], result.stderr
    assert sorted(here.iterdir()) == names
    assert tree(here) == before
    return result.stderr


def copied(model: Path) -> Path:
    """A copy of a model's folder to damage, in the working folder."""
    return shutil.copytree(model, Path.cwd() / "source")


def saved(folder: Path, **options: Any) -> Path:
    """A tiny model saved by transformers."""
    return write_model(folder, tiny_model(layers=2, hidden=32, intermediate=64, **options), max_shard_size="40KB")


def predicts_nan(model: Path) -> Path:
    """A copy of a model with a weight that is NaN, in the working folder."""
    folder = copied(model)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
