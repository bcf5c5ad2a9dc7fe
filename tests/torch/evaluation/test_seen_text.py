"""Whether an evaluation text was calibrated on."""

from __future__ import annotations

import random

import pytest

from neuronrank_torch.evaluation.seen_text import overlap, overlap_notes


def prose(seed: int, words: int = 4000) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghij", k=5)) for _ in range(words)]


def test_the_share_is_the_share() -> None:
    seen, unseen = prose(0, 30_000), prose(1, 30_000)
    for share in (0.0, 0.25, 0.5, 1.0):
        cut = int(share * len(seen))
        assert overlap(" ".join([*seen[:cut], *unseen[cut:]]), "\n".join(seen)) == pytest.approx(share, abs=0.05)


def test_a_long_run_is_found_wherever_it_stands() -> None:
    run = prose(2, 1500)
    mine, theirs = [*prose(3), *run, *prose(4)], [*run, *prose(5, 8000)]
    assert len([*overlap_notes(" ".join(mine), " ".join(theirs))]) == 1
    assert not [*overlap_notes(" ".join(prose(3)), " ".join(theirs))]


def test_what_is_said() -> None:
    text = " ".join(prose(6, 100))
    assert "is the calibration text" in next(overlap_notes(text, text))
    assert "is the calibration text" in next(overlap_notes(text, "", same=True))
    assert "shares about " in next(overlap_notes(" ".join([*prose(7), *prose(8)]), " ".join(prose(8))))
    assert not [*overlap_notes(text, "")]
    assert overlap("", text) == 0.0
