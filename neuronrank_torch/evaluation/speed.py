"""Speed of models, measured in turn, so that a busy machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neuronrank_core.errors import InvalidValueError
from neuronrank_core.measures import median_interval
from neuronrank_torch.model.limits import check_positions
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.text.sequences import check_room

#: Rounds that are measured, after one to warm up.
ROUNDS = 9
#: Tokens that are written in a round, and those that they follow.
NEW_TOKENS, PROMPT = 32, 8


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds.

    Parameters
    ----------
    median : float
        Median over the rounds.
    lower : float
        First quartile.
    upper : float
        Third quartile.
    """

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median and quartiles of some values."""
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class SpeedUp:
    """How many times as fast as another model.

    Parameters
    ----------
    median : float
        Median of the rounds' ratios.
    lower : float
        Lower end of the 96 % confidence interval of the median.
    upper : float
        Upper end, see :func:`neuronrank_core.measures.median_interval`.
    """

    median: float
    lower: float
    upper: float

    @property
    def clear(self) -> bool:
        """Whether the difference is larger than the spread of the measurement."""
        return not self.lower <= 1 <= self.upper


@dataclass(frozen=True)
class Speed:
    """Tokens per second.

    Parameters
    ----------
    prefill : Spread
        Reading a text, all its tokens in one forward pass.
    decode : Spread or None
        Writing one token at a time after a short text; null unless both models can write a few tokens.
    """

    prefill: Spread
    decode: Spread | None


def compare_speed(
    models: Sequence[Any], tokens: int, sequences: int, progress: Progress = silent
) -> tuple[list[Speed], dict[str, SpeedUp]]:
    """Speed of two models, and how many times as fast the second is, for ``prefill`` and ``decode``.

    Parameters
    ----------
    models : sequence of two transformers.PreTrainedModel
    tokens, sequences : int
        Size of the batch that is read; as many sequences are written.
    progress : callable
    """
    batches = [_batch(model, tokens, sequences) for model in models]
    tasks: dict[str, Callable[[Any, Any], None]] = {"prefill": _read, "decode": _write}
    if not all(map(_writes, models)):
        del tasks["decode"]
    amount = {"prefill": sequences * tokens, "decode": sequences * NEW_TOKENS}
    rates: dict[str, list[list[float]]] = {task: [[], []] for task in tasks}
    with torch.inference_mode():
        for done in range(ROUNDS + 1):
            progress("measuring speed", done, ROUNDS + 1, "rounds")
            for task, run in tasks.items():
                for model, batch, measured in zip(models, batches, rates[task], strict=True):
                    started = time.perf_counter()
                    run(model, batch)
                    measured.append(amount[task] / (time.perf_counter() - started))
    for a, b in rates.values():
        del a[0], b[0]
    spreads = [{task: Spread.of(rates[task][side]) for task in tasks} for side in (0, 1)]
    ratios = {task: [y / x for x, y in zip(*rates[task], strict=True)] for task in tasks}
    speeds = [Speed(spread["prefill"], spread.get("decode")) for spread in spreads]
    return speeds, {task: SpeedUp(statistics.median(r), *median_interval(r)) for task, r in ratios.items()}


def _writes(model: Any) -> bool:
    try:
        check_positions(model, PROMPT + NEW_TOKENS)
    except InvalidValueError:
        return False
    return bool(model.can_generate())


def _batch(model: Any, tokens: int, sequences: int) -> Any:
    check_positions(model, tokens)
    check_room(sequences, tokens)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(sequences * tokens, device=model.device) % vocabulary).view(sequences, tokens)


def _read(model: Any, batch: Any) -> None:
    model(input_ids=batch, use_cache=False).logits[0, -1, 0].item()  # Waits for the device.


def _write(model: Any, batch: Any) -> None:
    how = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    model.generate(batch[:, :PROMPT], **how)[0, -1].item()
