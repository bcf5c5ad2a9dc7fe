"""Every Python example in the documentation runs: those of a page one after another, as a reader would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import ROOT, blocks
from tiny import tiny_model, tiny_tokenizer

BLOCKS = blocks("python")


def names(folder: Path) -> dict[str, Any]:
    """What pages take as given: a model with its tokenizer and texts, a saved one, and the arrays of a layer."""
    rng = np.random.default_rng(0)
    model, tokenizer = tiny_model(layers=2, hidden=32, intermediate=64), tiny_tokenizer()
    for part in (model, tokenizer):
        for name in ("pruned", "smollm2-50"):
            part.save_pretrained(folder / "out" / name)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "texts": [f"Sentence {i} has {i * i} as its square." for i in range(300)],
        "activations": rng.normal(size=(60, 8)),
        "labels": rng.integers(0, 3, 60),
        "weight": rng.normal(size=(8, 4)),
    }


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in BLOCKS))
def test_it_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = names(tmp_path)
    for block in BLOCKS:
        if block.page != page or "def test_" in block.code:  # Tests are run as files, by test_method_example.py.
            continue
        # Blank lines before it, so that a traceback names the line of the page.
        exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec"), seen)
    if page == "docs/understand/beyond-llms.md":
        for pruned in ("weight", "outgoing"):
            assert (seen[pruned] == 0).sum() == seen[pruned].size // 2


def test_none_is_overlooked() -> None:
    assert {block.page for block in BLOCKS} >= {
        "README.md",
        "docs/understand/beyond-llms.md",
        "docs/understand/extending.md",
    }
    for file in {block.page for block in BLOCKS}:
        text = (ROOT / file).read_text("utf-8")
        assert text.count("```python") == sum(block.page == file for block in BLOCKS), file
