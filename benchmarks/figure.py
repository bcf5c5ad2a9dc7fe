"""Draws the figure of the documentation's first page: perplexity against sparsity, as SVG.

    python benchmarks/figure.py

Reads ``benchmarks/results/quality.jsonl`` (and SparseGPT's row of ``docs/measured/quality.md``, which was measured in
another environment) and writes ``docs/measured/quality.svg``. Needs nothing but the standard library.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from cells import read_cells

ROOT = Path(__file__).parents[1]
SPARSITIES = ("0.5", "0.6", "0.7")
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 232, 24, 52
#: Of the logarithmic axis.
LOWEST, HIGHEST = 25.0, 550.0
TICKS = (30, 50, 100, 200, 500)
#: Method and update of each line, with its colour; SparseGPT is not in the file of results.
LINES = {
    "Wanda": ("wanda", "none", "#b3541e"),
    "NeuronRank": ("neuronrank_wanda", "none", "#1f6fb2"),
    "SparseGPT": ("", "", "#6b6b6b"),
    "NeuronRank, gradual update": ("neuronrank_wanda", "gradual", "#12355b"),
}


def measured() -> dict[str, list[float]]:
    """Perplexity of each line at each sparsity, and of the dense model."""
    cells = {
        (cell["method"], cell["sparsity"], cell["update"]): cell["perplexity"]
        for cell in read_cells(ROOT / "benchmarks/results/quality.jsonl")
        if cell["seed"] == 0
    }
    [row] = re.findall(r"^\| SparseGPT \|(.*)\|$", (ROOT / "docs/measured/quality.md").read_text("utf-8"), re.MULTILINE)
    sparsegpt = [float(value) for value in row.split("|")[: len(SPARSITIES)]]
    lines = {
        label: [cells[method, sparsity, update] for sparsity in SPARSITIES] if method else sparsegpt
        for label, (method, update, _) in LINES.items()
    }
    return {**lines, "Dense": [cells["dense", "0", "none"]]}


def x(position: float) -> float:
    """Where a sparsity stands, 0 for the first and 1 for the last."""
    return LEFT + 24 + position * (WIDTH - LEFT - RIGHT - 48)


def y(perplexity: float) -> float:
    """Where a perplexity stands on the logarithmic axis."""
    share = math.log(perplexity / LOWEST) / math.log(HIGHEST / LOWEST)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def text(left: float, baseline: float, words: str, *, anchor: str = "start", fill: str = "#333", size: int = 13) -> str:
    """One line of text."""
    where = f'x="{left:.1f}" y="{baseline:.1f}" text-anchor="{anchor}"'
    return f'<text {where} fill="{fill}" font-size="{size}">{words}</text>'


def draw(values: dict[str, list[float]]) -> str:
    """The figure."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" role="img">',
        "<title>Perplexity against sparsity</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    end = WIDTH - RIGHT
    for tick in TICKS:
        parts += [
            f'<line x1="{LEFT}" x2="{end}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e3e3e3"/>',
            text(LEFT - 8, y(tick) + 4.5, str(tick), anchor="end"),
        ]
    for position, sparsity in enumerate(SPARSITIES):
        at = x(position / (len(SPARSITIES) - 1))
        parts.append(text(at, HEIGHT - BOTTOM + 20, f"{100 * float(sparsity):.0f} %", anchor="middle"))
    parts += [
        text((LEFT + end) / 2, HEIGHT - 10, "MLP weights set to zero", anchor="middle"),
        f'<g transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">'
        + text(0, 0, "perplexity (log scale)", anchor="middle")
        + "</g>",
    ]
    [dense] = values["Dense"]
    parts += [
        f'<line x1="{LEFT}" x2="{end}" y1="{y(dense):.1f}" y2="{y(dense):.1f}" stroke="#888" stroke-dasharray="5 4"/>',
        text(end + 8, y(dense) + 4.5, f"dense model: {dense:.1f}", fill="#555"),
    ]
    for label, (_, _, colour) in LINES.items():
        points = [(x(i / (len(SPARSITIES) - 1)), y(value)) for i, value in enumerate(values[label])]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
        parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3.6" fill="{colour}"/>' for left, top in points]
        parts.append(text(end + 8, points[-1][1] + 4.5, f"{label}: {values[label][-1]:.1f}", fill=colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/measured/quality.svg").write_text(draw(measured()), encoding="utf-8")
