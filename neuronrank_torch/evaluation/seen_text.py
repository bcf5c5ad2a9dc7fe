"""Whether an evaluation text was used for calibration."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

from neuronrank_core.errors import InputError
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.text.sources import load_text, text_fingerprint

#: Scripts that are written without spaces: Thai, Lao, Burmese, Khmer, kana and Han. Each character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")
#: Words per passage, and every how many words a passage starts on average. Where it starts depends only on its first
#: four words, so two texts are cut at the same places wherever they agree.
_WORDS, _EVERY = 32, 32
#: Fraction of common passages from which there is a warning. Less can be standard phrases or licences: the two halves
#: of the built-in text have 5 % in common.
NOTABLE = 0.1


def overlap(text: str, other: str) -> float:
    """Fraction of the passages of 32 words of a text that another text contains too, estimated from one in 32."""
    mine = set(_passages(text))
    return len(mine.intersection(_passages(other))) / max(len(mine), 1)


def overlap_notes(evaluation: str, calibration: str, *, same: bool = False) -> Iterator[str]:
    """Warnings about the evaluation text.

    Parameters
    ----------
    evaluation, calibration : str
    same : bool
        Whether they are known to be equal, if the calibration text is not available.
    """
    same = same or evaluation == calibration
    share = 1.0 if same else overlap(evaluation, calibration)
    if share >= NOTABLE:
        part = "is" if same else "is part of" if share == 1.0 else f"shares about {share:.0%} with"
        yield f"the evaluation text {part} the calibration text: perplexity after pruning looks better than it is"


def evaluation_notes(text: str, eval_text: str, statistics: StatisticsFolder | None) -> list[str]:
    """Warnings about the evaluation text, if there is one: whether it was used for calibration."""
    same = statistics is not None and text_fingerprint(eval_text) == statistics.header["text_sha256"]
    return list(overlap_notes(eval_text, text, same=same)) if eval_text else []


def _passages(text: str) -> Iterator[str]:
    words = _WORD.findall(text)
    for start in range(len(words) - _WORDS + 1):
        if crc32(" ".join(words[start : start + 4]).encode("utf-8", errors="surrogatepass")) % _EVERY == 0:
            yield " ".join(words[start : start + _WORDS])


def calibration_text(statistics: StatisticsFolder, tokenizer: Any) -> str:
    """The text behind statistics, if it is on this machine and unchanged; otherwise empty."""
    name = statistics.dataset
    try:
        if name != "builtin" and not Path(name).expanduser().is_file():
            return ""
        text = load_text(name, "calibration", tokenizer)
    except (InputError, OSError, RuntimeError):  # Another file by now, or a home folder that does not exist.
        return ""
    return text if text_fingerprint(text) == statistics.header["text_sha256"] else ""
