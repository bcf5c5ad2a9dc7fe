"""Every Python example in the documentation runs: those of a page one after another, as a reader would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_model, tiny_tokenizer

from .pages import ROOT, Block, blocks

BLOCKS = blocks("python")
#: Pages whose examples prune the real model.
SLOW = {"docs/start/tutorial.md"}


def names(folder: Path) -> dict[str, Any]:
    """What pages take as given: a model with its tokenizer and texts, a saved one, and the arrays of a layer."""
    rng = np.random.default_rng(0)
    model, tokenizer = tiny_model(layers=2, hidden=32, intermediate=64), tiny_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(folder / "out" / "pruned")
    return {
        "model": model,
        "tokenizer": tokenizer,
        "texts": [f"Sentence {i} has {i * i} as its square." for i in range(300)],
        "activations": rng.normal(size=(60, 8)),
        "labels": rng.integers(0, 3, 60),
        "weight": rng.normal(size=(8, 4)),
    }


def pages() -> Iterator[Any]:
    for page in dict.fromkeys(block.page for block in BLOCKS):
        marks = [pytest.mark.slow, pytest.mark.xdist_group("real model")] if page in SLOW else []
        yield pytest.param([block for block in BLOCKS if block.page == page], id=page, marks=marks)


@pytest.mark.parametrize("examples", list(pages()))
def test_it_runs(examples: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = names(tmp_path)
    for block in examples:
        # Blank lines before it, so that a traceback names the line of the page.
        exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / block.page), "exec"), seen)
    if examples[0].page == "docs/beyond-llms.md":
        for pruned in ("weight", "outgoing"):
            assert (seen[pruned] == 0).sum() == seen[pruned].size // 2


def test_none_is_overlooked() -> None:
    assert {block.page for block in BLOCKS} >= {"README.md", "docs/beyond-llms.md", "docs/understand/extending.md"}
    for file in {block.page for block in BLOCKS}:
        text = (ROOT / file).read_text("utf-8")
        assert text.count("```python") == sum(block.page == file for block in BLOCKS), file
