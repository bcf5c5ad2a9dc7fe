"""The calibration text of the sampled tokens, as words."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuronrank_core import InputError, LayerStatistics
from neuronrank_core.statistics.selectivity import strongest_tokens
from neuronrank_torch.text.sequences import Tokens

#: Tokens shown before and after the one at which a neuron fires.
BEFORE, AFTER = 18, 8


@dataclass(frozen=True)
class Passages:
    """The calibration sequences and the tokenizer that made them.

    Parameters
    ----------
    sequences : int64 array, shape (documents, seqlen)
        As drawn for the statistics; row i is document i.
    tokenizer : transformers.PreTrainedTokenizerBase
    """

    sequences: Tokens
    tokenizer: Any

    def sampled_tokens(self, table: LayerStatistics) -> list[str]:
        """The word of each sampled token, without surrounding white space, shape (sampled tokens,)."""
        document, position = self._where(table)
        ids = self.sequences[document, position]
        words = {int(i): self.tokenizer.decode([int(i)]) for i in np.unique(ids)}
        return [visible(words[int(i)]) for i in ids]

    def strongest(self, table: LayerStatistics, signal: NDArray[np.generic], most: int) -> list[dict[str, Any]]:
        """Passages around the sampled tokens at which a signal is largest, one per document.

        Parameters
        ----------
        table : LayerStatistics
        signal : array, shape (sampled tokens,)
        most : int
            Maximum number of passages.

        Returns
        -------
        list of dicts
            ``before``, ``token``, ``after``: text; ``signal``: that at the token; ``document``, ``position``.
        """
        document, position = self._where(table)
        found = []
        for row in strongest_tokens(signal, document, most):
            text = self._around(self.sequences[document[row]], int(position[row]))
            where = {"document": int(document[row]), "position": int(position[row])}
            found.append({**text, **where, "signal": float(signal[row])})
        return found

    def _where(self, table: LayerStatistics) -> tuple[Tokens, Tokens]:
        """Sequence of each sampled token and position in it."""
        document, position = table.document[table.sample_documents()], table.sampled_positions()
        if document.size and (document.max() >= len(self.sequences) or position.max() >= self.sequences.shape[1]):
            raise InputError("the statistics contain documents that the text does not have")
        return document, position

    def _around(self, sequence: Tokens, position: int) -> dict[str, str]:
        start = max(0, position - BEFORE)
        before, token = sequence[start:position].tolist(), sequence[start : position + 1].tolist()
        after = sequence[start : position + 1 + AFTER].tolist()
        # Prefixes of one decoded text, because many tokenizers decode a word without the space before it.
        texts = [str(self.tokenizer.decode(ids)) if ids else "" for ids in (before, token, after)]
        first, second = (_common(texts[i], texts[i + 1]) for i in (0, 1))
        second = max(first, second)
        before, word, after = texts[2][:first], texts[2][first:second], texts[2][second:]
        head, tail = (word[: len(word) - len(word.lstrip())], word[len(word.rstrip()) :]) if word.strip() else ("", "")
        return {"before": before + head, "token": visible(word), "after": tail + after}


def _common(short: str, long: str) -> int:
    """Length of the common prefix: all of the shorter text, unless it ends within a character."""
    return next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), min(len(short), len(long)))


def visible(word: str) -> str:
    """A word without surrounding white space; a symbol for white space alone."""
    return word.strip() or ("⏎" if "\n" in word else "␣")
