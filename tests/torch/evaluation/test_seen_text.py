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


@pytest.mark.parametrize("script", [range(0x4E00, 0x9FFF), range(0x3041, 0x3096), range(0x0E01, 0x0E30)])
def test_a_text_without_spaces(script: range) -> None:
    rng = random.Random(9)
    seen, unseen = ("".join(map(chr, rng.choices(script, k=20_000))) for _ in range(2))
    assert overlap(seen[10_000:] + unseen[:10_000], seen) == pytest.approx(0.5, abs=0.1)


def test_what_is_said() -> None:
    text = " ".join(prose(6, 100))
    assert "is the calibration text" in next(overlap_notes(text, text))
    assert "is the calibration text" in next(overlap_notes(text, "", same=True))
    assert "shares about " in next(overlap_notes(" ".join([*prose(7), *prose(8)]), " ".join(prose(8))))
    assert not [*overlap_notes(text, "")]
    assert overlap("", text) == 0.0


def test_a_part_of_the_calibration_text_is_not_all_of_it() -> None:
    seen = prose(0, 8000)
    assert "is part of the calibration text" in next(overlap_notes(" ".join(seen[2000:4000]), " ".join(seen)))
