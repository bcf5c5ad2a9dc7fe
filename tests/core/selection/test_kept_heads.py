"""Which heads go: by hand, whole groups or query heads of every group, the lowest index on a tie."""

from __future__ import annotations

import numpy as np
import pytest

from neuronrank_core import (
    METHODS,
    AllZeroMetricError,
    InvalidValueError,
    Recipe,
    ScoringContext,
    document_statistics,
    merge,
)
from neuronrank_core.methods import check_recipe, requires
from neuronrank_core.selection.heads import head_options, kept_heads, lost_share
from neuronrank_core.statistics.table import SAMPLE, SIGNAL


def context(signal: list[float], *, spread: float = 0.0, **recipe: object) -> ScoringContext:
    """Heads whose signal is about the same at each of four tokens, with two columns of ``o_proj`` each."""
    tokens = np.array(signal) + spread * np.array([[-1.0], [1.0], [-1.0], [1.0]])
    weights = {"o_proj": np.repeat(np.array(signal), 2)[None] * np.array([[3.0], [4.0]])}
    chosen = Recipe(**{"sparsity_type": "heads", "sparsity_ratio": 1 / 3, "method": "wanda", **recipe})
    return ScoringContext(0, chosen, weights, document_statistics(0, signal=tokens), heads=len(signal))


#: Mean squares by group: 1, 81, 81 = 163; 4, 4, 4 = 12; 49, 49, 9 = 107.
NINE = [1, 9, 9, 2, 2, 2, 7, 7, 3]


def test_groups_go_by_the_sum_of_their_heads() -> None:
    assert kept_heads(context(NINE, sparsity_type="key-value-groups"), groups=3).tolist() == [0, 1, 2, 6, 7, 8]


def test_the_weakest_group_may_have_the_strongest_head() -> None:
    # 25 + 25 = 50 against 36 + 1 = 37
    one = context([5, 5, 6, 1], sparsity_type="key-value-groups", sparsity_ratio=0.5)
    assert kept_heads(one, groups=2).tolist() == [0, 1]


def test_the_lowest_of_every_group_goes_and_the_first_of_a_tie() -> None:
    assert kept_heads(context(NINE, sparsity_type="query-heads"), groups=3).tolist() == [1, 2, 4, 5, 6, 7]


def test_what_is_left_open_is_what_loses_less() -> None:
    # 12 of 282 by group, 1 + 4 + 9 = 14 by query head.
    assert kept_heads(context(NINE), groups=3).tolist() == [0, 1, 2, 6, 7, 8]
    assert lost_share(context(NINE), groups=3) == pytest.approx(12 / 282)
    assert lost_share(context(NINE, sparsity_type="query-heads"), groups=3) == pytest.approx(14 / 282)
    cheap_third = [1, 9, 9, 1, 9, 9, 9, 9, 1]
    assert kept_heads(context(cheap_third), groups=3).tolist() == [1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("heads", "groups", "ratio", "options"),
    [
        (9, 3, 1 / 3, {"query-heads": 3, "key-value-groups": 3}),
        (9, 3, 0.99, {"query-heads": 6, "key-value-groups": 6}),
        (4, 1, 0.25, {"query-heads": 1}),  # Gemma 3 270M
        (16, 8, 0.25, {"key-value-groups": 4}),
        (12, 4, 0.5, {"key-value-groups": 6}),  # One of three query heads would be 4.
        (6, 6, 0.5, {"key-value-groups": 3}),
    ],
)
def test_the_ways_that_remove_most(heads: int, groups: int, ratio: float, options: dict[str, int]) -> None:
    assert head_options(heads, groups, Recipe(sparsity_type="heads", sparsity_ratio=ratio)) == options


@pytest.mark.parametrize(
    ("heads", "groups", "ratio", "by", "options"),
    [
        (16, 8, 0.49, 4, {"query-heads": 0, "key-value-groups": 0}),
        (16, 8, 0.5, 4, {"query-heads": 8, "key-value-groups": 8}),
        (16, 8, 0.7, 2, {"query-heads": 8, "key-value-groups": 8}),  # Not 5 groups: 3 would stay.
        (24, 8, 0.4, 4, {"query-heads": 8}),
        (9, 3, 0.4, 2, {"key-value-groups": 3}),
        (9, 3, 0.9, 3, {"query-heads": 6}),
    ],
)
def test_the_heads_and_groups_that_stay_are_divisible(
    heads: int, groups: int, ratio: float, by: int, options: dict[str, int]
) -> None:
    chosen = Recipe(sparsity_type="heads", sparsity_ratio=ratio, divisible_by=by)
    if not any(options.values()):
        with pytest.raises(InvalidValueError, match=r"at least 0\.5 .* with --divisible-by 4"):
            head_options(heads, groups, chosen)
        return
    assert head_options(heads, groups, chosen) == options


def test_as_many_heads_go_as_divisibility_says() -> None:
    # Of 0.7 * 4 groups two may go, so that two stay: those of 1 + 1 and 4 + 4.
    one = context([1, 1, 5, 5, 2, 2, 6, 6], sparsity_type="key-value-groups", sparsity_ratio=0.7, divisible_by=2)
    assert kept_heads(one, groups=4).tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize(
    ("heads", "groups", "chosen", "allowed"),
    [
        (9, 3, {"sparsity_ratio": 0.33}, "at least 0.3334 and below 1, to remove heads of 3 key-value groups"),
        (8, 2, {"sparsity_ratio": 0.2}, "at least 0.25 and below 1"),
        (8, 2, {"sparsity_ratio": 0.3, "sparsity_type": "key-value-groups"}, "at least 0.5 and below 1"),
        (1, 1, {"sparsity_ratio": 0.9}, "none"),
        (9, 3, {"sparsity_ratio": 0.0}, "at least 0.3334"),
    ],
)
def test_a_ratio_that_removes_no_head_is_refused(heads: int, groups: int, chosen: dict, allowed: str) -> None:
    with pytest.raises(InvalidValueError, match=f"allowed: {allowed}"):
        head_options(heads, groups, Recipe(**{"sparsity_type": "heads", **chosen}))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"sparsity_ratio": 1.0}, "sparsity_ratio is 1.0, allowed: below 1"),
        ({"propagate": "dense"}, "propagate"),
        ({"update": "gradual"}, "update"),
        ({"include_attention": True}, "include_attention"),
    ],
)
def test_what_cannot_be_asked_of_heads(fields: dict, name: str) -> None:
    with pytest.raises(InvalidValueError, match=name):
        Recipe(sparsity_type="heads", **fields)


def test_scores_by_hand() -> None:
    def score(method: str, **recipe: object) -> list[float]:
        return METHODS[method].head_score(context([2, 5], spread=1, method=method, **recipe)).tolist()

    assert score("wanda") == [5, 26]  # (1 + 9) / 2, (16 + 36) / 2
    assert score("magnitude") == [200, 1250]  # Two columns of 25 * 2^2, of 25 * 5^2
    assert score("neuronrank_tfidf", idf_exp=0.0) == [2, 5]
    # A document where 40 % of the tokens reach the quantile: df 1 of 1 group.
    assert score("neuronrank_tfidf", spikiness_exp=1.0) == pytest.approx([3, 6])
    assert score("neuronrank_wanda", tf_exp=2.0) == pytest.approx([5, 26])
    assert score("neuronrank_unstructured") == pytest.approx([1, 1])  # The variance between tokens


def test_a_selective_head_is_kept_by_its_idf() -> None:
    # Both have a mean of 2; the first fires in every document, the second in one of three.
    tables = [document_statistics(d, signal=np.array([[2.0, 6.0 * (d == 0)]] * 4)) for d in range(3)]
    recipe = Recipe(sparsity_type="heads", method="neuronrank_tfidf", q_active=0.7)
    own = ScoringContext(0, recipe, {"o_proj": np.ones((1, 2))}, merge(tables), heads=2)
    common, selective = METHODS["neuronrank_tfidf"].head_score(own)
    assert common == pytest.approx(2)  # idf = log(4 / 4) + 1
    assert selective == pytest.approx(2 * (np.log(4 / 2) + 1))
    assert kept_heads(own, groups=1).tolist() == [1]


@pytest.mark.parametrize(
    ("chosen", "kinds"),
    [
        ({"method": "magnitude"}, set()),
        ({"method": "wanda"}, {SIGNAL}),
        ({"method": "neuronrank_wanda"}, {SIGNAL}),
        ({"method": "neuronrank_wanda", "idf_exp": 1.0}, {SIGNAL, SAMPLE}),
        ({"method": "neuronrank_tfidf", "input_exp": 1.0}, {SIGNAL, SAMPLE}),
        ({"method": "neuronrank_old"}, {SIGNAL}),
    ],
)
def test_what_is_collected(chosen: dict, kinds: set[str]) -> None:
    assert requires(Recipe(sparsity_type="heads", **chosen)) == kinds


@pytest.mark.parametrize("method", ["ria", "dass"])
def test_methods_without_a_score_for_heads_are_refused(method: str) -> None:
    with pytest.raises(InvalidValueError, match="with sparsity_type heads, one of magnitude"):
        check_recipe(Recipe(sparsity_type="heads", method=method))


def test_all_zero_scores_are_an_error() -> None:
    with pytest.raises(AllZeroMetricError, match="All-zero metric in layer 0 heads"):
        kept_heads(context([0, 0], sparsity_ratio=0.5), groups=2)
