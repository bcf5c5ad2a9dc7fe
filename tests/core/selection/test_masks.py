"""From statistics to masks: the recipe's share and comparison, attention, errors that name the place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import MODULES, Layer, random_layer

from neuronrank_core import (
    METHODS,
    AllZeroMetricError,
    MissingStatisticsError,
    NonFiniteError,
    Recipe,
    ScoringContext,
    prune_mask,
    select,
)
from neuronrank_core.selection.masks import gradual_mask, module_ratio, target_zeros


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sparsity_ratio": 0.3},
        {"sparsity_ratio": 0.3, "compare": "row"},
        {"sparsity_ratio": 0.3, "compare": "module"},
        {"sparsity_type": "2:4"},
        {"sparsity_type": "1:4", "compare": "module"},
    ],
)
def test_a_mask_is_the_selection_of_the_score(method: str, fields: dict) -> None:
    recipe, layer = Recipe(method=method, **fields), random_layer(neurons=8)
    context = layer.context(recipe)
    for module in MODULES:
        mask = prune_mask(module, context)
        score, compare = (
            METHODS[method].score(module, context),
            fields.get("compare") or METHODS[method].compare(module),
        )
        ratio, pattern = fields.get("sparsity_ratio", 0.5), {"2:4": (2, 4), "1:4": (1, 4)}.get(recipe.sparsity_type)
        expected = select(score, layer.weights[module], ratio=ratio, compare=compare, pattern=pattern)
        assert np.array_equal(mask, expected)
        if pattern:
            assert mask.sum() == mask.size * pattern[0] // pattern[1]


@pytest.mark.parametrize("method", METHODS)
def test_attention_goes_by_wanda_or_by_magnitude_where_nothing_is_collected(method: str) -> None:
    layer = random_layer()
    expected = "magnitude" if method == "magnitude" else "wanda"
    mask = prune_mask("q_proj", layer.context(Recipe(method=method)))
    assert np.array_equal(mask, prune_mask("q_proj", layer.context(Recipe(method=expected))))


@pytest.mark.parametrize(("module", "first"), [("up_proj", "gate_proj"), ("k_proj", "q_proj"), ("v_proj", "q_proj")])
def test_modules_that_read_the_same_input_share_its_statistics(module: str, first: str) -> None:
    context = random_layer().context(Recipe(method="wanda"))
    assert np.array_equal(context.input_rms(module), context.input_rms(first))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, 1.0])
def test_a_share_of_the_mask_is_its_lowest_part(method: str, share: float) -> None:
    context = random_layer().context(Recipe(method=method, sparsity_ratio=0.6))
    for module in MODULES:
        whole, part = prune_mask(module, context), prune_mask(module, context, share)
        groups = {"module": 1, "row": len(whole), "column": len(whole.T)}[METHODS[method].compare(module)]
        assert part.sum() == groups * int(0.6 * share * (whole.size // groups))
        assert not (part & ~whole).any()


@given(st.floats(0, 1), st.booleans())
def test_zeros_move_from_down_to_the_others(ratio: float, gated: bool) -> None:
    recipe = Recipe(allocate="modules")
    producers = ["gate_proj", "up_proj"] if gated else ["up_proj"]
    down, *others = (module_ratio(name, ratio, recipe, gated=gated) for name in ["down_proj", *producers])
    assert down + sum(others) == pytest.approx((1 + len(others)) * ratio)
    assert 0 <= down <= ratio <= others[0] == others[-1] <= 1 + 1e-12
    if 0.01 < ratio < 0.9:
        assert down == pytest.approx(0.88 * ratio)
    assert module_ratio("q_proj", ratio, recipe, gated=gated) == ratio
    assert module_ratio("down_proj", ratio, Recipe(), gated=gated) == ratio


def test_masks_have_the_ratio_of_their_module() -> None:
    context = random_layer(neurons=50).context(Recipe(method="wanda", allocate="modules", compare="module"))
    shares = {name: prune_mask(name, context).mean() for name in MODULES}
    assert shares == {"down_proj": 0.44, "gate_proj": 0.53, "up_proj": 0.53}


@pytest.mark.parametrize(("share", "gone"), [(0.1, 1), (0.5, 1), (0.51, 2), (1.0, 2)])
def test_a_share_of_n_in_m_is_rounded_up(share: float, gone: int) -> None:
    mask = prune_mask("gate_proj", random_layer().context(Recipe(sparsity_type="2:4")), share)
    assert (mask.reshape(-1, 4).sum(axis=1) == gone).all()


@pytest.mark.parametrize("method", METHODS)
def test_gradually_dense_zeros_are_chosen_whatever_became_of_them(method: str) -> None:
    layer = random_layer()
    layer.weights["gate_proj"][0, :3] = 0
    context = layer.context(Recipe(method=method, tfidf_k=3))
    candidate = layer.weights["gate_proj"] + 100.0 * (layer.weights["gate_proj"] == 0)
    norm = context.input_norm("gate_proj")
    mask = gradual_mask("gate_proj", context, norm, candidate, 1.0)
    assert np.array_equal(mask, prune_mask("gate_proj", context))
    few = gradual_mask("gate_proj", context, norm, candidate, 0.01)
    assert np.array_equal(few, layer.weights["gate_proj"] == 0)


def test_gradually_the_norm_given_takes_the_place_of_the_inputs_norm() -> None:
    context = random_layer().context(Recipe(method="wanda"))
    W, norm = context.weights["down_proj"], np.random.default_rng(0).uniform(0.1, 10, 7)
    mask = gradual_mask("down_proj", context, norm, W[::-1], 1.0)
    merit = np.abs(W[::-1]) * norm
    assert (merit[mask].reshape(len(W), -1).max(axis=1) < merit[~mask].reshape(len(W), -1).min(axis=1)).all()
    assert (mask.sum(axis=1) == W.shape[1] // 2).all()


@pytest.mark.parametrize("method", METHODS)
def test_another_weight_in_a_module_changes_its_scores_alone(method: str) -> None:
    context = random_layer().context(Recipe(method=method, tfidf_k=3))
    other = context.at("gate_proj", context.weights["gate_proj"][::-1] * 2)
    assert not np.array_equal(prune_mask("gate_proj", other), prune_mask("gate_proj", context))
    assert np.array_equal(prune_mask("up_proj", other), prune_mask("up_proj", context))
    assert other.neurons("doc") is context.neurons("doc")
    assert other.neurons("token") is not other.neurons("doc")


@pytest.mark.parametrize("method", METHODS)
def test_masking_leaves_weights_and_statistics_as_they_were(method: str) -> None:
    layer, recipe = random_layer(), Recipe(method=method)
    layer.weights["gate_proj"][0, :3] = 0
    context = layer.context(recipe)
    held = {**context.weights, **context.statistics.columns()}
    before = {name: array.copy() for name, array in held.items()}
    masks = [prune_mask(module, context) for module in (*MODULES, "q_proj")]
    assert all(np.array_equal(held[name], array) for name, array in before.items())
    again = [prune_mask(module, context) for module in (*MODULES, "q_proj")]
    assert all(np.array_equal(a, b) for a, b in zip(masks, again, strict=True))


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"magnitude"}))
def test_a_layer_without_statistics_is_an_error_that_names_it(method: str) -> None:
    context = ScoringContext(11, Recipe(method=method), random_layer().weights)
    with pytest.raises(MissingStatisticsError, match="No TF-IDF statistics for layer 11") as error:
        prune_mask("gate_proj", context)
    assert "layer.mlp.gate_proj" in error.value.hint


def silent(layer: Layer) -> Layer:
    """The same weights, and documents at which nothing fires."""
    for document in layer.documents:
        for array in (document.x, document.gate, document.up):
            array[:] = 0
    return layer


@pytest.mark.parametrize("method", ["wanda", "neuronrank_tfidf", "neuronrank_old", "neuronrank_wanda"])
def test_a_silent_layer_is_an_all_zero_metric(method: str) -> None:
    with pytest.raises(AllZeroMetricError, match="All-zero metric in layer 3 gate_proj") as error:
        prune_mask("gate_proj", silent(random_layer()).context(Recipe(method=method)))
    assert "--nsamples" in error.value.hint
    assert "--nr-q-active" in error.value.hint


@pytest.mark.parametrize("method", METHODS)
def test_a_broken_weight_is_an_error_that_names_its_module(method: str) -> None:
    layer = random_layer()
    layer.weights["up_proj"][1, 1] = np.nan
    with pytest.raises(NonFiniteError, match="layer 3 up_proj"):
        prune_mask("up_proj", layer.context(Recipe(method=method)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # By hand: zeros afterwards of a matrix whose first row is zero but for its last weight.
        ({"sparsity_type": "2:4"}, (3 + 4) + 2 * 4),
        ({"sparsity_ratio": 0.5, "compare": "row"}, 7 + 2 * 4),
        ({"sparsity_ratio": 0.5, "compare": "column"}, 7 + 1),
        ({"sparsity_ratio": 0.5, "compare": "module"}, 12),
        ({"sparsity_ratio": 0.25, "compare": "module"}, 7),
    ],
)
def test_zeros_of_a_matrix_that_has_some(settings: dict[str, Any], expected: int) -> None:
    weight = np.arange(1.0, 25.0).reshape(3, 8)
    weight[0, :7] = 0
    recipe = Recipe("magnitude", **settings)
    assert target_zeros("up_proj", weight.shape, recipe, zero=weight == 0) == expected
    mask = prune_mask("up_proj", ScoringContext(0, recipe, {"up_proj": weight}, None))
    assert ((weight == 0) | mask).sum() == expected
