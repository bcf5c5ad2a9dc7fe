"""The pictures of the first page: drawn from the figures in the repository, which are those of the tables."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from pages import DOCS, returned

MEASURED = DOCS / "measured"
PANELS = json.loads((MEASURED / "quality.json").read_text("utf-8"))["panels"]
#: The rows of the page on quality that the lines of SmolLM2 are: first cells of the table of all methods.
ROWS = {
    "Wanda": ("`wanda`", "none"),
    "NeuronRank": ("`neuronrank_wanda`", "none"),
    "NeuronRank, gradual update": ("`neuronrank_wanda`", "gradual"),
    "SparseGPT": ("SparseGPT",),
}


def draw(panels: object) -> str:
    """The figure, by the script."""
    return returned("figure.draw", panels)


def test_the_figure_shows_the_results() -> None:
    assert draw(PANELS) == (MEASURED / "quality.svg").read_text("utf-8")


@pytest.mark.parametrize("label", ROWS)
def test_the_results_are_those_of_the_table(label: str) -> None:
    cells = ROWS[label]
    page = (MEASURED / "quality.md").read_text("utf-8")
    [row] = re.findall(rf"^\| {re.escape(' | '.join(cells))} \|(.*)\|$", page, re.MULTILINE)
    [panel] = [panel for panel in PANELS if panel["model"] == "SmolLM2-135M-Instruct"]
    assert panel["lines"][label] == [float(value) for value in row.split("|")[:3]]
    assert f"dense {panel['dense']:.2f}" in page


def test_panels_stand_side_by_side_and_labels_apart() -> None:
    other = {**PANELS[0], "model": "Other <b>", "dense": 20.0, "lines": {"a": [21, 22, 23.0], "b": [21, 22, 23.1]}}
    root = ET.fromstring(draw([PANELS[0], other]))
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("viewBox") == "0 0 1280 380"
    first, second = root.findall(f"{space}g")
    texts = [(text.text or "", float(text.get("y", ""))) for text in second.iter(f"{space}text")]
    assert texts[0][0] == "Other <b> on WikiText-2"
    heights = sorted(y for words, y in texts if re.search(r": [\d.]+$", words))
    assert len(heights) == 3
    assert min(b - a for a, b in pairwise(heights)) >= 16
    # A higher perplexity is higher up.
    [path] = [line.get("points", "") for line in first.iter(f"{space}polyline") if line.get("class") == "line c0"]
    tops = [float(point.split(",")[1]) for point in path.split()]
    assert tops == sorted(tops, reverse=True)
    assert len(set(tops)) == 3


def test_the_session_loads_nothing() -> None:
    picture = (MEASURED / "session.svg").read_text("utf-8")
    assert "@font-face" not in picture
    assert not re.findall(r"(?:href=\"|url\()(?!#)", picture)
    words = re.sub(r"<[^>]+>", "", picture).replace("&#160;", " ")
    for said in ("$ neuronrank prune --model", "perplexity:", "size on disk:", "faster:", "sample: "):
        assert said in words
