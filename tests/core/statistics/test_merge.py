"""Merging tables: exact, commutative, associative, whatever the split and the order of the documents."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import ragged, random_row, same_bits, seeds

from neuronrank_core import InputError, LayerStatistics, document_statistics, merge


@st.composite
def rows(draw: st.DrawFn) -> list[LayerStatistics]:
    """Rows of distinct documents in no particular order."""
    rng = np.random.default_rng(draw(seeds))
    lengths = draw(ragged)
    numbers = draw(st.lists(st.integers(0, 99), min_size=len(lengths), max_size=len(lengths), unique=True))
    return [random_row(rng, i, n, tokens_per_document=5) for i, n in zip(numbers, lengths, strict=True)]


@given(rows(), st.data())
def test_any_split_in_any_order_equals_all_at_once(parts: list[LayerStatistics], data: st.DataObject) -> None:
    whole = merge(parts)
    assert np.all(np.diff(whole.document) > 0)
    shuffled = data.draw(st.permutations(parts))
    cuts = sorted(data.draw(st.lists(st.integers(1, len(parts)), max_size=3, unique=True)))
    split = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(parts)], strict=True) if a < b]
    assert same_bits(merge(merge(part) for part in split), whole)


@given(rows().filter(lambda r: len(r) >= 3))
def test_merge_is_associative_and_commutative(parts: list[LayerStatistics]) -> None:
    a, b, c = parts[0], parts[1], merge(parts[2:])
    whole = merge([merge([a, b]), c])
    assert same_bits(whole, merge([a, merge([b, c])]))
    assert all(same_bits(whole, merge(order)) for order in permutations([a, b, c]))


@given(rows())
def test_one_table_merges_to_itself(parts: list[LayerStatistics]) -> None:
    whole = merge(parts)
    assert same_bits(merge([whole]), whole)


@given(rows())
def test_sampled_tokens_stay_with_their_document(parts: list[LayerStatistics]) -> None:
    whole = merge(parts)
    of = whole.document[whole.sample_documents()]
    for part in parts:
        assert np.array_equal(whole.sample[of == part.document[0]], part.sample)


def test_tables_that_share_a_document_are_refused() -> None:
    rng = np.random.default_rng(0)
    one, two, three = (random_row(rng, i, 4) for i in (1, 2, 1))
    with pytest.raises(InputError, match="share documents"):
        merge([merge([one, two]), three])


def test_a_table_with_a_repeated_document_cannot_be_made() -> None:
    with pytest.raises(InputError, match="unique"):
        LayerStatistics(document=np.array([3, 3]), tokens=np.array([1, 1]))


@pytest.mark.parametrize(
    "other",
    [
        document_statistics(1, signal=np.ones((2, 3))),
        document_statistics(1, inputs={"down_proj": np.ones((2, 3))}),
        document_statistics(1, inputs={"gate_proj": np.ones((2, 4))}),
    ],
    ids=["signal", "another layer", "another width"],
)
def test_tables_with_different_columns_are_refused(other: LayerStatistics) -> None:
    with pytest.raises(InputError, match="different columns"):
        merge([document_statistics(0, inputs={"gate_proj": np.ones((2, 3))}), other])


def test_nothing_to_merge_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to merge"):
        merge([])
