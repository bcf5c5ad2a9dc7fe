"""One document's row: every column against plain float64 loops, padding, ragged lengths and non-finite values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import random_layer, same_bits, seeds

from neuronrank_core import InvalidValueError, NonFiniteError, Recipe, document_statistics, merge
from neuronrank_core.statistics.table import LayerStatistics, sample_positions


@given(seeds, st.integers(1, 9), st.integers(1, 6), st.floats(-1, 1))
def test_every_column_against_float64_loops(seed: int, tokens: int, kept: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    gate, x = rng.normal(size=(tokens, 3)), rng.normal(size=(tokens, 2))
    row = document_statistics(
        7, signal=abs(gate), gate=gate, inputs={"o_proj": x}, threshold=threshold, tokens_per_document=kept
    )
    assert row.document.tolist() == [7]
    assert row.tokens.tolist() == [tokens]
    sampled = [i * tokens // min(tokens, kept) for i in range(min(tokens, kept))]
    assert row.sample_tokens.tolist() == [len(sampled)]
    assert row.sample.tolist() == [[float(np.float32(abs(g))) for g in gate[i]] for i in sampled]
    for j in range(3):
        a = [abs(float(g)) for g in gate[:, j]]
        assert row.signal_mean[0, j] == pytest.approx(sum(a) / tokens, rel=1e-6)
        assert row.signal_mean_square[0, j] == pytest.approx(sum(v * v for v in a) / tokens, rel=1e-6)
        assert row.signal_max[0, j] == np.float32(max(a))
        assert row.open_gate[0, j] == sum(float(g) > threshold for g in gate[:, j])
    for k in range(2):
        mean_square = sum(float(v) ** 2 for v in x[:, k]) / tokens
        assert row.input_mean_square["o_proj"][0, k] == pytest.approx(mean_square, rel=1e-6)


def test_types_are_those_of_the_specification() -> None:
    columns = random_layer().collect(Recipe()).columns()
    counts = {"document", "tokens", "open_gate", "sample_tokens"}
    assert {name for name, column in columns.items() if column.dtype == np.int64} == counts
    assert all(column.dtype == np.float32 for name, column in columns.items() if name not in counts)


@given(seeds, st.lists(st.booleans(), min_size=1, max_size=12).filter(lambda p: not all(p)), st.booleans())
def test_padding_is_never_counted(seed: int, padding: list[bool], broken: bool) -> None:
    rng = np.random.default_rng(seed)
    gate, x = rng.normal(size=(len(padding), 3)), rng.normal(size=(len(padding), 2))
    real = ~np.array(padding)
    gate[~real], x[~real] = (np.nan, np.inf) if broken else (1e6, -1e6)
    seen = {"signal": abs(gate), "gate": gate, "inputs": {"gate_proj": x}}
    without = {"signal": abs(gate)[real], "gate": gate[real], "inputs": {"gate_proj": x[real]}}
    with_padding = document_statistics(0, **seen, padding=padding, tokens_per_document=4)
    assert same_bits(with_padding, document_statistics(0, **without, tokens_per_document=4))


def test_a_closed_gate_is_one_at_the_threshold() -> None:
    gate = np.array([[-1.0], [0.0], [0.5], [2.0]])
    counts = [document_statistics(0, signal=abs(gate), gate=gate, threshold=t).open_gate.item() for t in (0, 0.5, -1)]
    assert counts == [2, 1, 3]


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"signal": np.ones((3, 2)), "padding": [True, False]}, "padding is 2, allowed: 3"),
        (
            {"signal": np.ones((3, 2)), "padding": np.zeros((3, 2))},
            r"padding is \(3, 2\), allowed: of shape \(tokens,\)",
        ),
        ({"signal": np.ones(3)}, r"signal is \(3,\), allowed: of shape \(tokens, features\)"),
        ({"inputs": {"x": np.ones((1, 3, 2))}}, r"x is \(1, 3, 2\), allowed: of shape \(tokens, features\)"),
        ({"signal": np.ones((3, 2)), "gate": np.ones((3, 5))}, r"gate is \(3, 5\), allowed: \(3, 2\)"),
        ({"signal": [[1.0], [-0.5]]}, "signal is -0.5, allowed: values >= 0"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        document_statistics(0, **given_)


def test_a_square_that_float32_cannot_hold_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="layer 3 are too large for float32"):
        document_statistics(0, signal=[[1e25]], layer=3)


def test_mean_over_ragged_documents_by_hand() -> None:
    table = merge(document_statistics(i, signal=[[v] for v in a]) for i, a in enumerate([[4.0], [1.0, 2.0, 3.0]]))
    assert table.tokens.tolist() == [1, 3]
    assert table.signal_mean.ravel().tolist() == [4.0, 2.0]


@given(st.integers(1, 300), st.integers(1, 80))
def test_sample_positions_are_evenly_strided(tokens: int, kept: int) -> None:
    positions = sample_positions(tokens, kept)
    assert len(positions) == min(tokens, kept)
    assert positions[0] == 0
    assert positions[-1] < tokens
    steps = np.diff(positions)
    assert steps.size == 0 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)
    if tokens <= kept:
        assert positions.tolist() == list(range(tokens))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["signal", "gate", "down_proj"])
def test_a_non_finite_value_names_the_layer(value: float, where: str) -> None:
    seen = {name: np.ones((3, 2)) for name in ("signal", "gate", "down_proj")}
    seen[where][1, 1] = value
    with pytest.raises(NonFiniteError, match=f"{where} of layer 17") as error:
        document_statistics(
            0, signal=seen["signal"], gate=seen["gate"], inputs={"down_proj": seen["down_proj"]}, layer=17
        )
    assert error.value.hint


@pytest.mark.parametrize(
    "seen",
    [
        {"signal": np.ones((0, 2))},
        {"inputs": {"gate_proj": np.ones((0, 2))}},
        {"signal": np.ones((2, 2)), "padding": [True, True]},
        {"signal": np.ones((2, 2)), "inputs": {"gate_proj": np.ones((3, 2))}},
        {},
    ],
)
def test_a_document_has_one_positive_number_of_tokens(seen: dict) -> None:
    with pytest.raises(InvalidValueError, match="tokens"):
        document_statistics(0, **seen)


def test_columns_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="signal_mean has 2 rows, expected 1"):
        LayerStatistics(np.array([0]), np.array([4]), signal_mean=np.ones((2, 3), np.float32))
