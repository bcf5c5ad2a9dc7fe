"""Draws the figure of the frontier, perplexity against parameters and against speed, and prints its table by size.

    python benchmarks/frontier_figure.py

Reads ``benchmarks/results/frontier.jsonl``, the cells of ``frontier.py``, and writes ``frontier.svg`` beside the pages
of figures, for light and dark pages: a row for each model. Points with more than :data:`CEILING` times the dense
perplexity are left out there. The table compares all methods at the same sizes: the logarithm of the perplexity is
interpolated between the two cells of a method on both sides of a size, so that no method gains by going further or less
far than another.
"""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from cells import read_cells
from figure import LEFT, MEASURED, TITLES, WIDTH, apart, circles, frame, picture, polyline, scale, text

CEILING = 8.0
#: Room for the labels.
RIGHT = 262
#: Titles of the horizontal axes, by what is plotted there.
AXES = {
    "share": "parameters kept, outside the embeddings",
    "prefill median": "tokens per second of prefill, as a multiple of the dense model",
}
#: Methods in the order of their colours.
METHODS = ("NeuronRank", "FLAP", "SliceGPT", "LLM-Pruner", "ShortGPT", "ReplaceMe", "NeuronRank, neurons")
#: Shares of the parameters at which the methods are compared.
SHARES = (0.9, 0.8, 0.7, 0.5)
Point = tuple[float, float]


def points(cells: list[dict[str, Any]], measure: str, ceiling: float = CEILING) -> dict[str, list[Point]]:
    """For each method the points of its cells, the mean over seeds, from the dense model to the smallest."""
    found: dict[str, list[Point]] = {}
    for method in METHODS:
        own = [cell for cell in cells if cell["method"] == method and "perplexity" in cell]
        sizes = dict.fromkeys(cell["how far"] for cell in own)
        groups = [[cell for cell in own if cell["how far"] == size] for size in sizes]
        groups.sort(key=lambda group: -group[0]["share"])
        means = [tuple(statistics.fmean(c[key] for c in group) for key in (measure, "perplexity")) for group in groups]
        dense = (1.0, own[0]["dense"]) if own else ()
        found[method] = [(x, y) for x, y in [dense, *means] if y <= ceiling * own[0]["dense"]] if own else []
    return {method: line for method, line in found.items() if len(line) > 1}


def interpolated(line: list[Point], share: float) -> float | None:
    """Perplexity at a share of the parameters; None outside of what was measured."""
    for (right, above), (left, below) in pairwise(line):
        if left - 5e-5 <= share <= right:
            part = min(1.0, (right - share) / (right - left))
            return math.exp((1 - part) * math.log(above) + part * math.log(below))
    return None


def table(cells: list[dict[str, Any]]) -> str:
    """For each model a row per method: perplexity at the same sizes."""
    rows = []
    for model in dict.fromkeys(cell["setup"]["model"] for cell in cells):
        lines = points([cell for cell in cells if cell["setup"]["model"] == model], "share", math.inf)
        rows += [
            "",
            TITLES.get(model, model),
            "",
            "| method | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |",
        ]
        rows.append("| --- |" + " ---: |" * len(SHARES))
        for method, line in lines.items():
            values = [interpolated(line, share) for share in SHARES]
            shown = ["" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.0f}" for value in values]
            rows.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(rows)


def panel(title: str, measure: str, cells: list[dict[str, Any]]) -> list[str]:
    """The marks of one model and one horizontal axis."""
    lines, end = points(cells, measure), WIDTH - RIGHT
    dense = next(iter(lines.values()))[0][1]
    low, high = 0.9 * dense, 1.1 * max(y for line in lines.values() for _, y in line)
    places = [x for line in lines.values() for x, _ in line]
    first, last = (1.0, min(places)) if measure == "share" else (min(places), max(places))

    def x(value: float) -> float:
        return LEFT + 16 + (value - first) / (last - first) * (end - LEFT - 32)

    y, (left, right) = scale(low, high), sorted((first, last))
    tenths = range(math.ceil(10 * left - 1e-9), math.floor(10 * right + 1e-9) + 1)
    below = [(x(t / 10), f"{t * 10}%" if measure == "share" else f"{t / 10:.1f}") for t in tenths]
    parts = frame(title, AXES[measure], below, dense, low, high, end)
    for (method, line), height in zip(lines.items(), apart([y(line[-1][1]) for line in lines.values()]), strict=True):
        kind, marks = f"c{METHODS.index(method)}", [(x(left), y(top)) for left, top in line]
        parts += [polyline(marks, kind), *circles(marks[1:], kind)]
        shown = f"{method}: {line[-1][1]:.1f} at " + (
            f"{line[-1][0]:.0%}" if measure == "share" else f"{line[-1][0]:.2f}"
        )
        parts.append(text(end + 8, height + 4.5, shown, kind=f"mark {kind}"))
    return parts


def draw(cells: list[dict[str, Any]]) -> str:
    """The figure: a row for each model, a column for each axis."""
    models = list(dict.fromkeys(cell["setup"]["model"] for cell in cells))
    return picture(
        "Perplexity against parameters and against speed",
        [
            [
                panel(TITLES.get(model, model), measure, [c for c in cells if c["setup"]["model"] == model])
                for measure in AXES
            ]
            for model in models
        ],
    )


if __name__ == "__main__":
    measured = read_cells(Path(__file__).parent / "results" / "frontier.jsonl")
    (MEASURED / "frontier.svg").write_text(draw(measured), encoding="utf-8")
    print(table(measured))
