"""Which neurons go: by hand, exactly as many as asked for, the lowest index on a tie."""

import numpy as np
import pytest

from neuronrank_core import AllZeroMetricError, InvalidValueError, Recipe, ScoringContext, document_statistics
from neuronrank_core.methods import check_recipe
from neuronrank_core.selection.whole_neurons import kept_neurons, removed_neurons


def context(products: list[float], down: list[float], **recipe: object) -> ScoringContext:
    """Neurons of constant product signal, each with one down weight."""
    h = np.tile(np.array(products), (4, 1))
    table = document_statistics(0, signal=abs(h), gate=h, inputs={"down_proj": h, "gate_proj": np.ones((4, 2))})
    neurons = len(products)
    weights = {"gate_proj": np.ones((neurons, 2)), "up_proj": np.ones((neurons, 2)), "down_proj": np.array([down])}
    return ScoringContext(0, Recipe(sparsity_type="neurons", **recipe), weights, table)


def test_strength_is_rms_times_norm_of_the_down_column() -> None:
    # Strengths 3, 4, 1, 8: two of four go, the weakest two.
    assert kept_neurons(context([1, 2, 1, 4], [3, 2, 1, 2])).tolist() == [1, 3]


def test_seed_formula_does_not_look_at_the_down_weights() -> None:
    c = context([1, 2, 3, 4], [9, 1, 1, 1], method="neuronrank_tfidf", idf_exp=0.0)
    assert kept_neurons(c).tolist() == [2, 3]


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 5), (0.2, 4), (0.59, 3)])
def test_exactly_int_ratio_times_neurons_go_and_ties_go_first_index_first(ratio: float, left: int) -> None:
    kept = kept_neurons(context([1] * 5, [1] * 5, sparsity_ratio=ratio))
    assert kept.tolist() == list(range(5 - left, 5))


@pytest.mark.parametrize(
    ("neurons", "ratio", "multiple", "goes"),
    [(1536, 0.2, None, 307), (1536, 0.2, 64, 256), (1536, 0.25, 64, 384), (100, 0.5, 32, 36), (7, 0.99, 2, 5)],
)
def test_a_multiple_stays(neurons: int, ratio: float, multiple: int | None, goes: int) -> None:
    recipe = Recipe(sparsity_type="neurons", sparsity_ratio=ratio, multiple_of=multiple)
    assert removed_neurons(neurons, recipe) == goes


def test_the_neurons_that_go_are_as_many_as_the_multiple_says() -> None:
    strengths = [1.0, 5, 2, 7, 3, 6, 4]
    kept = kept_neurons(context(strengths, [1] * 7, sparsity_ratio=0.8, multiple_of=3))
    assert kept.tolist() == [1, 3, 5]


@pytest.mark.parametrize(("ratio", "multiple"), [(0.2, 4), (0.5, 5)])
def test_a_multiple_that_removes_no_neuron_is_refused(ratio: float, multiple: int) -> None:
    with pytest.raises(InvalidValueError, match=f"multiple_of is {multiple}, allowed: a number with a multiple from"):
        removed_neurons(4, Recipe(sparsity_type="neurons", sparsity_ratio=ratio, multiple_of=multiple))


def test_a_ratio_that_leaves_no_neuron_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"sparsity_ratio is 1\.0, allowed: below 1"):
        Recipe(sparsity_type="neurons", sparsity_ratio=1.0)


def test_all_zero_scores_are_an_error() -> None:
    with pytest.raises(AllZeroMetricError, match="All-zero metric in layer 0 neurons"):
        kept_neurons(context([0, 0], [1, 1]))


def test_magnitude_is_the_product_of_a_neuron_s_norms() -> None:
    weights = {
        "gate_proj": np.array([[3.0, 4], [1, 0], [0, 2]]),  # Norms 5, 1, 2.
        "up_proj": np.array([[1.0, 0], [0, 6], [0, 2]]),  # 1, 6, 2.
        "down_proj": np.array([[1.0, 0, 0], [0, 1, 2]]),  # 1, 1, 2; the products are 5, 6 and 8.
    }
    recipe = Recipe(sparsity_type="neurons", method="magnitude", sparsity_ratio=0.4)
    assert kept_neurons(ScoringContext(0, recipe, weights)).tolist() == [1, 2]
    plain = {name: weight for name, weight in weights.items() if name != "gate_proj"}  # 1, 6, 4.
    recipe = Recipe(sparsity_type="neurons", method="magnitude", sparsity_ratio=0.7)
    assert kept_neurons(ScoringContext(0, recipe, plain)).tolist() == [1]


@pytest.mark.parametrize("method", ["wanda", "ria"])
def test_methods_without_a_neuron_factor_are_refused(method: str) -> None:
    with pytest.raises(InvalidValueError, match="neuronrank_wanda"):
        check_recipe(Recipe(sparsity_type="neurons", method=method))


@pytest.mark.parametrize("field", [{"pruning_last": 2}, {"include_attention": True}, {"prune_lm_head": True}])
def test_what_would_leave_layers_of_different_width_is_refused(field: dict[str, object]) -> None:
    with pytest.raises(InvalidValueError, match=next(iter(field))):
        Recipe(sparsity_type="neurons", **field)


def test_removed_neurons_are_not_chosen_gradually() -> None:
    with pytest.raises(InvalidValueError, match="none or least-squares with sparsity_type neurons"):
        Recipe(sparsity_type="neurons", update="gradual")
