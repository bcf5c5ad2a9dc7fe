"""Writes what the pages show of the cells of ``peers.py``: the tables of two models and the figure of the first page.

    python benchmarks/peers_pages.py

Reads ``benchmarks/results/peers.jsonl``. A table replaces what stands between ``<!-- its name -->`` and
``<!-- end -->`` in the README and in the page on quality. Figures are means over the calibration seeds that all rows of
a column have; those beside ALPS, which takes long, are of seed 0.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cells import read_cells
from figure import LEFT, MEASURED, TITLES, WIDTH, apart, circles, frame, picture, polyline, scale, text

CELLS = Path(__file__).parent / "results" / "peers.jsonl"
#: Room for the labels.
RIGHT = 236
#: The models in the order of the columns, with short names.
MODELS = {"builtin:smollm2-135m": "SmolLM2", "gemma-3-270m-q4_k_m.gguf": "Gemma 3"}
#: Columns, with their titles.
SPARSITIES = {"0.5": "50 %", "0.6": "60 %", "0.7": "70 %", "2:4": "2:4", "4:8": "4:8"}
Row = tuple[str, str]
BEST, GOOD, GRADUAL = ("neuronrank_wanda", "effort best"), ("neuronrank_wanda", "gradual"), ("wanda", "gradual")
DEFAULT, WANDA = ("neuronrank_wanda", "none"), ("wanda", "none")
SPARSEGPT, ALPS = ("SparseGPT", "its own"), ("ALPS", "its own")
ROWS: dict[Row, str] = {
    BEST: "`neuronrank_wanda`, `--effort best`",
    GOOD: "`neuronrank_wanda`, `--effort good`",
    GRADUAL: "`wanda`, `--update gradual`",
    SPARSEGPT: "SparseGPT (its own code)",
    DEFAULT: "`neuronrank_wanda` (default)",
    WANDA: "`wanda`",
}
BESIDE_ALPS: dict[Row, str] = {row: ROWS[row] for row in (BEST, GOOD)} | {
    ALPS: "ALPS (its own code)",
    SPARSEGPT: ROWS[SPARSEGPT],
    WANDA: ROWS[WANDA],
}
#: At N:M the same run, so measured once: nothing to compare for ``best``, and the factor of the neuron cancels.
SAME_AT_N_OF_M = {BEST: GOOD, GRADUAL: GOOD, DEFAULT: WANDA}
#: What is compared cell by cell.
CLAIMS = ((BEST, GOOD), (BEST, GRADUAL), (BEST, ALPS), (BEST, SPARSEGPT), (GOOD, SPARSEGPT), (DEFAULT, WANDA))
#: Lines of the figure, in the order of their colours.
LINES = {WANDA: "Wanda", DEFAULT: "NeuronRank, default", SPARSEGPT: "SparseGPT", BEST: "NeuronRank, best"}


def heading(model: str, sparsity: str) -> str:
    """Title of a column."""
    return f"{MODELS[model]}, {SPARSITIES[sparsity]}"


class Cells:
    """Results by model, sparsity, row and seed."""

    def __init__(self, cells: list[dict[str, Any]]) -> None:
        self._by: dict[tuple[str, str, Row], dict[int, dict[str, Any]]] = {}
        for cell in cells:
            key = (cell["setup"]["model"], cell["sparsity"], (cell["method"], cell["update"]))
            self._by.setdefault(key, {})[cell["seed"]] = cell
        present = {model for model, _, _ in self._by}
        self.columns = [(m, s) for m in MODELS if m in present for s in SPARSITIES if self._of(m, s, WANDA)]
        self.models = list(dict.fromkeys(model for model, _ in self.columns))

    def _of(self, model: str, sparsity: str, row: Row) -> dict[int, dict[str, Any]]:
        return self._by.get((model, sparsity, row), {})

    def dense(self, model: str) -> float:
        """Perplexity of the dense model."""
        [cell] = self._of(model, "0", ("dense", "none")).values()
        return float(cell["perplexity"])

    def values(self, model: str, sparsity: str, row: Row, measure: str = "perplexity") -> dict[int, Any]:
        """A measure by seed; at N:M of the row that it shares its run with."""
        shared = SAME_AT_N_OF_M.get(row, row) if ":" in sparsity else row
        return {seed: cell[measure] for seed, cell in self._of(model, sparsity, shared).items()}

    def seeds(self, model: str, sparsity: str) -> list[int]:
        """The seeds that all rows of a column have."""
        return sorted(set.intersection(*(set(self.values(model, sparsity, row)) for row in ROWS)))

    def mean(self, model: str, sparsity: str, row: Row, measure: str = "perplexity") -> float | None:
        """Mean over the seeds of the column; None if it has none."""
        found, seeds = self.values(model, sparsity, row, measure), self.seeds(model, sparsity)
        return statistics.fmean(found[seed] for seed in seeds) if seeds else None


def table(
    columns: list[tuple[str, str]],
    value: Callable[[str, str, Row], float | None],
    form: str,
    rows: dict[Row, str] = ROWS,
    *,
    mark: bool = False,
) -> str:
    """A row per method, a column per model and sparsity; ``mark`` prints the lowest value of each column in bold."""
    titles = [heading(*column) for column in columns]
    shown: dict[Row, list[str]] = {row: [] for row in rows}
    for model, sparsity in columns:
        column = {row: value(model, sparsity, row) for row in rows}
        lowest = min((number for number in column.values() if number is not None), default=None)
        for row, number in column.items():
            word = "" if number is None else format(number, form)
            shown[row].append(f"**{word}**" if mark and number is not None and number == lowest else word)
    lines = ["| | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    return "\n".join([*lines, *(f"| {rows[row]} | {' | '.join(words)} |" for row, words in shown.items())])


def perplexities(cells: Cells) -> str:
    """Perplexity, and below it the number of seeds."""
    seeds = [str(len(cells.seeds(*column))) for column in cells.columns]
    return table(cells.columns, cells.mean, ".2f", mark=True) + f"\n| *calibration seeds* | {' | '.join(seeds)} |"


def excesses(cells: Cells) -> str:
    """Increase over the dense model, as a share of that of plain Wanda."""

    def excess(model: str, sparsity: str, row: Row) -> float | None:
        own, plain = cells.mean(model, sparsity, row), cells.mean(model, sparsity, WANDA)
        dense = cells.dense(model)
        return None if own is None or plain is None else (own - dense) / (plain - dense)

    return table(cells.columns, excess, ".3f")


def choices(cells: Cells) -> str:
    """What ``--effort best`` chose, with its perplexity and that of ``good`` on held-out calibration text."""
    lines = ["| | seed | chosen | held out | `good` |", "| --- | --- | --- | ---: | ---: |"]
    for model, sparsity in (column for column in cells.columns if ":" not in column[1]):
        chosen, held_out = (cells.values(model, sparsity, BEST, measure) for measure in ("chosen", "held_out"))
        for seed, name in sorted(chosen.items()):
            best, good = (held_out[seed][recipe] for recipe in (name, "good"))
            lines.append(f"| {heading(model, sparsity)} | {seed} | `{name}` | {best:.2f} | {good:.2f} |")
    return "\n".join(lines)


def seconds(cells: Cells) -> str:
    """Processor time."""
    return table(cells.columns, lambda model, sparsity, row: cells.mean(model, sparsity, row, "cpu_seconds"), ".0f")


def beside_alps(cells: Cells, measure: str, form: str) -> str:
    """Figures of seed 0 where ALPS was measured."""
    columns = [column for column in cells.columns if 0 in cells.values(*column, ALPS)]
    return table(columns, lambda *at: cells.values(*at, measure).get(0), form, BESIDE_ALPS)


def claims(cells: Cells) -> str:
    """For each comparison: in how many cells the first perplexity is not above the second, and where it is."""
    labels = ROWS | BESIDE_ALPS
    lines = ["| | compared with | not above it in | above it in |", "| --- | --- | --- | --- |"]
    for first, second in CLAIMS:
        held, above = 0, []
        for model, sparsity in cells.columns:
            same = ":" in sparsity and SAME_AT_N_OF_M.get(first, first) == SAME_AT_N_OF_M.get(second, second)
            own, other = cells.values(model, sparsity, first), cells.values(model, sparsity, second)
            for seed in () if same else sorted(set(own) & set(other)):
                where = f"{heading(model, sparsity)}, seed {seed}"
                held += own[seed] <= other[seed]
                above += [f"{where}: {own[seed]:.2f} and {other[seed]:.2f}"] * (own[seed] > other[seed])
        if held or above:
            count = f"{held} of {held + len(above)}"
            lines.append(f"| {labels[first]} | {labels[second]} | {count} | {'; '.join(above) or 'none'} |")
    return "\n".join(lines)


TABLES = {
    "perplexity of two models": perplexities,
    "excess of two models": excesses,
    "choices of best": choices,
    "seconds of two models": seconds,
    "perplexity beside ALPS": partial(beside_alps, measure="perplexity", form=".2f"),
    "seconds beside ALPS": partial(beside_alps, measure="seconds", form=".0f"),
    "comparisons of two models": claims,
}


def filled(page: str, cells: list[dict[str, Any]]) -> str:
    """A page with its tables in place."""
    of = Cells(cells)
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = block.sub(lambda found, make=make: f"{found[1]}\n{make(of)}\n\n{found[2]}", page)
    return page


def panel(cells: Cells, model: str) -> list[str]:
    """The marks of one model."""
    end, dense = WIDTH - RIGHT, cells.dense(model)
    sparsities = [sparsity for sparsity in SPARSITIES if ":" not in sparsity and cells.seeds(model, sparsity)]
    means = {row: [cells.mean(model, sparsity, row) for sparsity in sparsities] for row in LINES}
    lines = {row: [value for value in values if value is not None] for row, values in means.items()}
    low, high = dense * 0.9, 1.15 * max(max(values) for values in lines.values())

    def x(i: int) -> float:
        return LEFT + 24 + i / (len(sparsities) - 1) * (end - LEFT - 48)

    y = scale(low, high)
    below = [(x(i), f"{float(sparsity):.0%}") for i, sparsity in enumerate(sparsities)]
    parts = frame(f"{TITLES[model]} on WikiText-2", "MLP weights set to zero", below, dense, low, high, end)
    *labels, last = apart([*(y(values[-1]) for values in lines.values()), y(dense)])
    parts.append(text(end + 8, last + 4.5, f"dense model: {dense:.1f}"))
    for i, ((row, values), height) in enumerate(zip(lines.items(), labels, strict=True)):
        points = [(x(j), y(value)) for j, value in enumerate(values)]
        parts += [polyline(points, f"c{i}"), *circles(points, f"c{i}")]
        parts.append(text(end + 8, height + 4.5, f"{LINES[row]}: {values[-1]:.1f}", kind=f"mark c{i}"))
    return parts


def draw(cells: list[dict[str, Any]]) -> str:
    """The figure: a panel per model, side by side."""
    of = Cells(cells)
    return picture("Perplexity against sparsity", [[panel(of, model) for model in of.models]])


if __name__ == "__main__":
    measured = read_cells(CELLS)
    (MEASURED / "quality.svg").write_text(draw(measured), encoding="utf-8")
    for page in (MEASURED.parents[1] / "README.md", MEASURED / "quality.md"):
        page.write_text(filled(page.read_text("utf-8"), measured), encoding="utf-8")
