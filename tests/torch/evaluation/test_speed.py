"""Speed: what is counted, in which order, and what counts as a difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import LlamaConfig

from neuronrank_core import InvalidValueError
from neuronrank_torch.evaluation import speed
from neuronrank_torch.evaluation.speed import SpeedUp, Spread, compare_speed


class Clock:
    """A clock that only models advance."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Model:
    """Reads a batch in some seconds, and writes each token in some more; a slow round is told to it."""

    device = torch.device("cpu")

    def __init__(self, clock: Clock, read: float, write: float, calls: list[Any], positions: int = 64) -> None:
        self.clock, self.seconds, self.calls = clock, (read, write), calls
        self.config = LlamaConfig(max_position_embeddings=positions)

    def can_generate(self) -> bool:
        return True

    def get_input_embeddings(self) -> Any:
        return torch.nn.Embedding(5, 2)

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        assert input_ids.max() < 5
        self.calls.append((self, tuple(input_ids.shape)))
        # A busy machine: every round takes longer than the one before.
        self.clock.now += self.seconds[0] * (1 + len(self.calls))
        return type("Output", (), {"logits": torch.zeros(1, 1, 1)})

    def generate(self, batch: Tensor, *, max_new_tokens: int, **how: Any) -> Tensor:
        assert how["min_new_tokens"] == max_new_tokens
        assert not how["do_sample"]
        self.clock.now += self.seconds[1] * max_new_tokens
        return torch.zeros(len(batch), batch.shape[1] + max_new_tokens)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ticking = Clock()
    monkeypatch.setattr(speed, "time", ticking)
    return ticking


def test_tokens_of_all_sequences_count_and_the_first_round_does_not(clock: Clock) -> None:
    calls: list[Any] = []
    a, b = Model(clock, 2.0, 0.5, calls), Model(clock, 1.0, 0.5, calls)
    (of_a, of_b), speed_up = compare_speed([a, b], tokens=7, sequences=3)
    assert [shape for _, shape in calls] == [(3, 7)] * 20
    assert [model for model, _ in calls] == [a, b] * 10  # in turn
    # The fifth of the nine rounds is the sixth call of each: calls 11 and 12.
    assert of_a.prefill.median == pytest.approx(21 / (2 * 12))
    assert of_b.prefill.median == pytest.approx(21 / (1 * 13))
    assert of_a.decode == of_b.decode == Spread(*[pytest.approx(3 / 0.5)] * 3)  # three sequences
    assert speed_up["prefill"].median == pytest.approx(2 * 12 / 13)
    assert speed_up["prefill"].clear
    assert not speed_up["decode"].clear


def test_quartiles_and_differences_within_the_spread() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 50.0]) == Spread(3.0, 2.0, 4.0)
    assert SpeedUp(1.1, 1.01, 1.2).clear
    assert SpeedUp(0.9, 0.8, 0.99).clear
    assert not SpeedUp(1.1, 0.99, 1.2).clear
    assert not SpeedUp(1.0, 1.0, 1.0).clear


def test_models_with_few_positions_are_only_read(clock: Clock) -> None:
    models = [Model(clock, 1.0, 1.0, [], positions=positions) for positions in (64, 8)]
    (of_a, of_b), speed_up = compare_speed(models, tokens=7, sequences=3)
    assert of_a.decode is of_b.decode is None
    assert list(speed_up) == ["prefill"]
    with pytest.raises(InvalidValueError, match=r"seqlen is 9, allowed: \[2, 8\]"):
        compare_speed(models, tokens=9, sequences=3)
    with pytest.raises(MemoryError, match="9223372036854775808 sequences of 2 tokens"):
        compare_speed(models, tokens=2, sequences=2**63)


def test_a_real_model_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 2)
    model = tiny_model("llama", layers=1)
    (found, _), _ = compare_speed([model, model], tokens=16, sequences=2)
    assert found.prefill.median > 0
    assert found.decode is not None
