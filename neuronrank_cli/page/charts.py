"""Positions of the marks of a chart. The templates draw them as SVG, with colours for light and dark mode.

Without a chart library, because those need megabytes of script or fix colours and text sizes in the picture.
All charts fit the screen of a phone, and a wide page shows several in a row, so text is readable on both.
"""

import math
from dataclasses import dataclass
from typing import Any

#: Size of a chart in its own units, and the margins for its axes.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 46, 10, 12, 38

Tick = tuple[float, str]


@dataclass(frozen=True)
class Axis:
    """Values from low to high along an axis that runs from ``start`` to ``end`` in the chart's units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Position of a value."""
        low, high, x = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (x - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, most: int = 5) -> list[Tick]:
        """Round values along the axis: positions and labels."""
        values = _log_steps(self.low, self.high, most) if self.log else _steps(self.low, self.high, most)
        return [(self.at(value), f"{value:g}") for value in values]


def _steps(low: float, high: float, most: int) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_steps(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        values = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
        if len(values) <= most + 1:
            break
    return values if len(values) > 1 else _steps(low, high, most)


def across(low: float, high: float, *, log: bool = False) -> Axis:
    """The horizontal axis."""
    return Axis(low, high, LEFT, WIDTH - RIGHT, log)


def upward(low: float, high: float, *, log: bool = False) -> Axis:
    """The vertical axis."""
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def _layer_axis(layers: list[int]) -> Axis:
    return across(layers[0] - 0.5, layers[-1] + 0.5)


def _layer_ticks(layers: list[int]) -> list[Tick]:
    return [tick for tick in _layer_axis(layers).ticks(6) if float(tick[1]).is_integer()]


def share_bars(shares: dict[int, float]) -> dict[str, Any]:
    """A bar for each layer, from 0 to 100 %."""
    x, y = _layer_axis(list(shares)), upward(0.0, 1.0)
    width = round((x.at(1) - x.at(0)) * 0.8, 2)
    bars = [
        {
            "x": round(x.at(layer) - width / 2, 2),
            "y": y.at(share),
            "width": width,
            "height": round(y.start - y.at(share), 2),
            "title": f"layer {layer}: {share:.2%}",
        }
        for layer, share in shares.items()
    ]
    return {
        "bars": bars,
        "x_ticks": _layer_ticks(list(shares)),
        "y_ticks": [(y.at(v), f"{v:.0%}") for v in (0, 0.25, 0.5, 0.75, 1)],
    }


def bands(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Quantiles over the layers: two bands around a median. Logarithmic if values are positive and far apart."""
    layers = [entry["layer"] for entry in entries]
    rows = [entry["quantiles"] for entry in entries]
    low, high = min(map(min, rows)), max(map(max, rows))
    log = low > 0 and high / low > 8
    x, y = _layer_axis(layers), upward(low, high if high > low else low + 1, log=log)

    def line(quantile: int) -> list[str]:
        return [f"{x.at(layer)},{y.at(row[quantile])}" for layer, row in zip(layers, rows, strict=True)]

    areas = [" ".join([*line(a), *reversed(line(b))]) for a, b in ((0, 4), (1, 3))]
    hovers = [
        {"x": x.at(layer), "title": f"layer {layer}: median {row[2]:.4g}, half of them {row[1]:.4g} to {row[3]:.4g}"}
        for layer, row in zip(layers, rows, strict=True)
    ]
    return {
        "areas": areas,
        "median": " ".join(line(2)),
        "hovers": hovers,
        "slot": round(x.at(1) - x.at(0), 2),
        "log": log,
        "x_ticks": _layer_ticks(layers),
        "y_ticks": y.ticks(),
    }


def most_in_a_cell(layers: list[dict[str, Any]]) -> int:
    """The largest number of neurons in a cell of any layer."""
    return max((count for layer in layers for _, _, count in layer["cells"]), default=1)


def strength(count: int, most: int) -> float:
    """Opacity of a cell. The square root, so that single neurons are visible next to hundreds."""
    return round(0.2 + 0.8 * math.sqrt(count / most), 3)


def legend_counts(most: int) -> list[int]:
    """Numbers of neurons whose colours a legend shows, from one to the most."""
    return sorted({1, *(max(1, round(most * share)) for share in (0.1, 0.4)), most})


def density(tf: list[float], idf: list[float], layer: dict[str, Any], most: int) -> dict[str, Any]:
    """Neurons of one layer, with TF across and IDF upward; more neurons in a cell give a stronger colour.

    ``most`` is the number of neurons that has the full colour.
    """
    x, y = across(tf[0], tf[-1], log=True), upward(idf[0], idf[-1])
    cells = [
        {
            "x": x.at(tf[i]),
            "y": y.at(idf[j + 1]),
            "width": round(x.at(tf[i + 1]) - x.at(tf[i]), 2),
            "height": round(y.at(idf[j]) - y.at(idf[j + 1]), 2),
            "opacity": strength(count, most),
            "title": f"{count} neuron{'s' * (count > 1)}: TF {tf[i]:.3g} to {tf[i + 1]:.3g}, "
            f"IDF {idf[j]:.3g} to {idf[j + 1]:.3g}",
        }
        for i, j, count in layer["cells"]
    ]
    return {**layer, "cells": cells, "x_ticks": x.ticks(), "y_ticks": y.ticks()}
