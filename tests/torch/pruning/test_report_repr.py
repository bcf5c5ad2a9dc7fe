"""What a notebook shows of a report."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

from pruning import MLP, linears, pruned, recipe, small


def test_the_repr_is_one_line_that_says_what_was_zeroed() -> None:
    model = small(layers=3, tied=False)
    report = pruned(model, recipe(method="wanda", sparsity_ratio=0.3, pruning_last=2, prune_lm_head=True))
    weights = [linears(model, layer)[name].weight for layer in (1, 2) for name in MLP] + [model.lm_head.weight]
    zeros, size = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    line = repr(report)
    assert line.startswith(f"Report(wanda, 0.3 unstructured: {zeros:,} of {size:,} weights zero ({zeros / size:.2%}) ")
    assert re.fullmatch(r".* in 2 layers and lm_head, \d+\.\d s\)", line)
    assert len(line) < 130


def test_removed_neurons_are_not_zeros() -> None:
    model = small()
    size = sum(linears(model, layer)[name].weight.numel() for layer in (0, 1) for name in MLP)
    line = repr(pruned(model, recipe(sparsity_type="neurons", sparsity_ratio=0.25)))
    gone = size - sum(linears(model, layer)[name].weight.numel() for layer in (0, 1) for name in MLP)
    assert f"neuronrank_wanda, 0.25 neurons: {gone:,} of {size:,} weights removed (25.00%) in 2 layers" in line


class Cells(HTMLParser):
    """The texts of all cells, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        del attrs
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_html_has_a_row_for_each_layer_and_escapes_what_it_shows() -> None:
    model = small()
    report = replace(pruned(model, recipe(method="magnitude", sparsity_ratio=0.5)), notes=("a <b> & c",))
    html = report._repr_html_()
    cells = Cells(html).cells
    assert cells[:5] == ["layer", "weights", "zeros", "share", "seconds"]
    for layer in (0, 1):
        weights = [linears(model, layer)[name].weight for name in MLP]
        zeros, size = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
        assert cells[5 + 5 * layer : 9 + 5 * layer] == [str(layer), f"{size:,}", f"{zeros:,}", "50.00%"]
    assert "<li>a &lt;b&gt; &amp; c</li>" in html
    assert "magnitude, 0.5 unstructured" in html
