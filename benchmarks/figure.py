"""What the figures of perplexity are drawn with: panels in rows, as SVG for light and dark pages.

Needs nothing but the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

MEASURED = Path(__file__).parents[1] / "docs" / "measured"
#: Names of the models, by that in a cell's setup.
TITLES = {"builtin:smollm2-135m": "SmolLM2-135M-Instruct", "gemma-3-270m-q4_k_m.gguf": "Gemma 3 270M"}
#: Of one panel.
WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 236, 44, 52
#: Least distance between two labels at the ends of lines.
GAP = 17.0
TICKS = [m * 10.0**power for power in range(6) for m in (1, 2, 3, 5)]
#: Colours of the lines in the order of the file, on light and on dark.
COLOURS = (
    ("#b3541e", "#f2ab63"),
    ("#1f6fb2", "#6fb1ff"),
    ("#6b6b6b", "#a9b1ba"),
    ("#12355b", "#c3e0ff"),
    ("#2e7d4f", "#7fd3a2"),
    ("#8a3f86", "#dd9ad8"),
    ("#d9975f", "#8a5a2f"),
)
STYLE = """<style>
.paper { fill: #fff; } .words { fill: #333; } .grid { stroke: #e3e3e3; } .dense { stroke: #888; stroke-dasharray: 5 4; }
.line { fill: none; stroke-width: 2.2; }
%s
@media (prefers-color-scheme: dark) {
.paper { fill: #131416; } .words { fill: #cfd3d8; } .grid { stroke: #33383f; }
%s
}
</style>"""


def rules(theme: int) -> str:
    """The colours of the lines in a theme."""
    return "\n".join(
        f".line.c{i} {{ stroke: {pair[theme]}; }} .mark.c{i} {{ fill: {pair[theme]}; }}"
        for i, pair in enumerate(COLOURS)
    )


def text(
    left: float, baseline: float, words: str, *, anchor: str = "start", kind: str = "words", size: int = 13
) -> str:
    """One line of text."""
    where = f'x="{left:.1f}" y="{baseline:.1f}" text-anchor="{anchor}"'
    return f'<text {where} class="{kind}" font-size="{size}">{escape(words)}</text>'


def apart(heights: list[float]) -> list[float]:
    """Heights of labels that do not overlap, each as near to its own as those below it allow."""
    placed = list(heights)
    order = sorted(range(len(heights)), key=lambda i: -heights[i])
    for below, above in pairwise(order):
        placed[above] = min(placed[above], placed[below] - GAP)
    return placed


def scale(low: float, high: float) -> Callable[[float], float]:
    """The height in a panel of each perplexity between two, on a logarithmic scale."""
    return lambda value: HEIGHT - BOTTOM - math.log(value / low) / math.log(high / low) * (HEIGHT - TOP - BOTTOM)


def frame(
    title: str, axis: str, below: Iterable[tuple[float, str]], dense: float, low: float, high: float, end: int
) -> list[str]:
    """A panel without its lines, from LEFT to ``end``: titles, grid, marks below it, the line of the dense model."""
    y = scale(low, high)
    parts = [text(LEFT, 24, title, size=15)]
    for tick in (tick for tick in TICKS if low <= tick <= high):
        parts += [
            f'<line x1="{LEFT}" x2="{end}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="grid"/>',
            text(LEFT - 8, y(tick) + 4.5, f"{tick:g}", anchor="end"),
        ]
    parts += [text(left, HEIGHT - BOTTOM + 20, words, anchor="middle") for left, words in below]
    return [
        *parts,
        text((LEFT + end) / 2, HEIGHT - 10, axis, anchor="middle"),
        f'<g transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2:.1f}) rotate(-90)">'
        + text(0, 0, "perplexity (log scale)", anchor="middle")
        + "</g>",
        f'<line x1="{LEFT}" x2="{end}" y1="{y(dense):.1f}" y2="{y(dense):.1f}" class="dense"/>',
    ]


def polyline(points: Sequence[tuple[float, float]], kind: str) -> str:
    """A line through points."""
    return f'<polyline points="{" ".join(f"{left:.1f},{top:.1f}" for left, top in points)}" class="line {kind}"/>'


def circles(points: Sequence[tuple[float, float]], kind: str) -> list[str]:
    """A mark at each point."""
    return [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3.6" class="mark {kind}"/>' for left, top in points]


def picture(title: str, grid: Sequence[Sequence[list[str]]]) -> str:
    """The SVG file of panels in rows of equal length."""
    width, height = WIDTH * len(grid[0]), HEIGHT * len(grid)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        STYLE % (rules(0), rules(1)),
        f'<rect width="{width}" height="{height}" class="paper"/>',
    ]
    for row, panels in enumerate(grid):
        for column, panel in enumerate(panels):
            parts += [f'<g transform="translate({column * WIDTH} {row * HEIGHT})">', *panel, "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"
