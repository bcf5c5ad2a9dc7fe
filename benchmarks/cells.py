"""Results as lines of JSON: added one by one, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_cells(out: Path) -> list[dict[str, Any]]:
    """Results so far."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def add_cell(out: Path, **cell: Any) -> None:
    """Add a result."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(cell) + "\n")


def setup_of(
    model: str, calibrate: str, evaluate: str, texts: tuple[str, str], nsamples: int, seqlen: int, windows: int
) -> dict[str, str]:
    """What a cell is calibrated and evaluated on."""
    return {
        "model": Path(model).name,
        "calibrated on": described(calibrate, texts[0], nsamples, seqlen),
        "evaluated on": described(evaluate, texts[1], windows, seqlen),
    }


def described(file: str, text: str, count: int, tokens: int) -> str:
    """A text of a setup and how much of it is used: sequences, or windows, of so many tokens."""
    from neuronrank_torch.text.sources import text_fingerprint  # Here, because the figures do without.

    return f"{Path(file).name} {text_fingerprint(text)[:8]}, {count} x {tokens}"
