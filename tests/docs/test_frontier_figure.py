"""The figure of the frontier: what is drawn for which cell."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from pages import returned

SPACE = "{http://www.w3.org/2000/svg}"
SETUP = {"model": "a <b>"}


def cell(method: str, keep: float, perplexity: float, seed: int = 0, **more: object) -> dict[str, object]:
    own = {"method": method, "how far": f"{keep}", "keep": keep, "seed": seed, "setup": SETUP, "share": keep}
    return {**own, "perplexity": perplexity, "dense": 20.0, "prefill median": 2 - keep, **more}


def run(function: str, cells: list[dict[str, object]]) -> str:
    """What a function of the script returns."""
    return returned(f"frontier_figure.{function}", cells)


def panels(cells: list[dict[str, object]]) -> list[ET.Element]:
    return ET.fromstring(run("draw", cells)).findall(f"{SPACE}g")


def lines(panel: ET.Element) -> dict[str, list[tuple[float, ...]]]:
    """The points of each line of a panel."""
    found = {}
    for line in panel.iter(f"{SPACE}polyline"):
        found[line.get("class", "")] = [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
    return found


def words(panel: ET.Element) -> list[str]:
    return [text.text or "" for text in panel.iter(f"{SPACE}text")]


def test_lines_go_from_the_dense_model_to_the_smallest() -> None:
    # In the file in another order, with two seeds at 0.8.
    cells = [cell("NeuronRank", 0.5, 80), cell("NeuronRank", 0.8, 39), cell("NeuronRank", 0.8, 41, seed=1)]
    share, speed = panels([*cells, cell("FLAP", 0.8, 60)])
    [ours, flap] = lines(share).values()
    assert len(ours) == 3
    assert len(flap) == 2
    assert ours[0] == flap[0]
    assert ours[1][0] == flap[1][0]
    # Half of the parameters is farther to the right than a fifth, as far apart as the shares; twice the perplexity
    # is the same distance on a log scale.
    assert abs((ours[2][0] - ours[0][0]) / (ours[1][0] - ours[0][0]) - 2.5) < 0.01
    assert abs((ours[0][1] - ours[1][1]) - (ours[1][1] - ours[2][1])) < 0.2
    assert abs((ours[0][1] - flap[1][1]) / (ours[0][1] - ours[1][1]) - 1.585) < 0.01
    assert "NeuronRank: 80.0 at 50%" in words(share)
    assert words(share)[0] == "a <b>"
    # Faster is to the right.
    xs = [x for x, _ in lines(speed)["line c0"]]
    assert xs == sorted(xs)
    assert "NeuronRank: 80.0 at 1.50" in words(speed)


def test_what_cannot_be_shown_is_left_out() -> None:
    shown = [cell("NeuronRank", 0.8, 40), cell("FLAP", 0.8, 60), cell("FLAP", 0.5, 161)]
    refused = {"method": "SliceGPT", "how far": "0.8", "keep": 0.8, "seed": 0, "setup": SETUP, "cannot": "a norm"}
    panel = panels([*shown, refused])[0]
    assert {kind: len(line) for kind, line in lines(panel).items()} == {"line c0": 2, "line c1": 2}
    assert "FLAP: 60.0 at 80%" in words(panel)


def test_each_model_has_a_row_of_its_own_scale() -> None:
    other = {"setup": {"model": "other"}, "dense": 5.0}
    found = panels([cell("NeuronRank", 0.8, 40), cell("NeuronRank", 0.8, 10, **other)])
    assert [words(panel)[0] for panel in found] == ["a <b>", "a <b>", "other", "other"]
    assert [panel.get("transform") for panel in found[::2]] == ["translate(0 0)", "translate(0 380)"]
    assert lines(found[0]) == lines(found[2])
    assert "NeuronRank: 40.0 at 80%" in words(found[0])
    assert "NeuronRank: 10.0 at 80%" in words(found[2])


def test_the_table_compares_at_the_same_sizes() -> None:
    # 20 at 100 %. At 0.85 twice that, at 0.75 four times: at 0.8 their geometric mean; at 0.9 two thirds of the way.
    between = [cell("ShortGPT", 0.75, 80, share=0.75), cell("ShortGPT", 0.85, 40, share=0.85)]
    exact = [cell("FLAP", 0.9, 30, share=0.89999), cell("FLAP", 0.5, 20000, share=0.5)]
    rows = [line for line in run("table", between + exact).splitlines() if line.startswith("|")]
    assert rows[0] == "| method | 90% | 80% | 70% | 50% |"
    short, flap = (next(row for row in rows if row.startswith(f"| {name} ")) for name in ("ShortGPT", "FLAP"))
    assert short == f"| ShortGPT | {20 * 2 ** (2 / 3):.2f} | {(40 * 80) ** 0.5:.2f} |  |  |"
    assert flap.startswith("| FLAP | 30.00 |")
    assert flap.endswith("| 20000 |")
