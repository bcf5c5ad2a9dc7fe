"""What the methods promise of each other: special cases, scale and order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import MODULES, Layer, random_layer, seeds

from neuronrank_core import METHODS, LayerStatistics, Recipe, prune_mask

ratios = st.floats(0.05, 0.95)


def mask(layer: Layer, module: str, table: LayerStatistics | None = None, **fields: object) -> np.ndarray:
    return prune_mask(module, layer.context(Recipe(**fields), table))


def score(layer: Layer, module: str, recipe: Recipe, table: LayerStatistics | None = None) -> np.ndarray:
    return METHODS[recipe.method].score(module, layer.context(recipe, table))


def scaled(layer: Layer, factor: object) -> Layer:
    """The layer's table stays; its weights are multiplied."""
    return Layer({name: weight * factor for name, weight in layer.weights.items()}, layer.documents)


@given(seeds, ratios, st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([-1.0, 0.0, 2.0]))
def test_neuronrank_wanda_contains_wanda(seed: int, ratio: float, tf_exp: float, idf_exp: float) -> None:
    layer, ours = random_layer(seed), {"tf_exp": tf_exp, "idf_exp": idf_exp, "sparsity_ratio": ratio}
    for module in MODULES:
        wanda = mask(layer, module, method="wanda", sparsity_ratio=ratio)
        assert np.array_equal(mask(layer, module, method="neuronrank_wanda", compare="row", **ours), wanda)
    assert np.array_equal(mask(layer, "down_proj", method="neuronrank_wanda", **ours), wanda)


@given(seeds, ratios)
def test_wanda_does_not_see_the_scale_of_a_row(seed: int, ratio: float) -> None:
    layer = random_layer(seed)
    for module in MODULES:
        weight = layer.weights[module]
        powers = 2.0 ** np.random.default_rng(seed).integers(-3, 4, size=(len(weight), 1))
        other = Layer({**layer.weights, module: weight * powers}, layer.documents)
        masks = [mask(one, module, method="wanda", sparsity_ratio=ratio) for one in (layer, other)]
        assert np.array_equal(*masks)


@given(seeds, st.sampled_from([0.25, 4.0]))
def test_scaling_the_weights_scales_the_score(seed: int, factor: float) -> None:
    layer = random_layer(seed)
    table = layer.collect(Recipe())
    for method in METHODS:
        for weight_exp in (1.0, 2.0):
            recipe = Recipe(method=method, weight_exp=weight_exp)
            # RIA scores shares of rows and columns, which have no scale.
            exponent = weight_exp if "weight_exp" in METHODS[method].reads else float(method != "ria")
            one, other = (score(a, "down_proj", recipe, table) for a in (layer, scaled(layer, factor)))
            assert other == pytest.approx(one * factor**exponent)


@given(seeds, st.sampled_from([0.0, 0.5, 1.5]), st.sampled_from(["doc", "topic", "token"]))
def test_scaling_the_signal_scales_tf_alone(seed: int, tf_exp: float, mode: str) -> None:
    layer = random_layer(seed)
    recipe = Recipe(method="neuronrank_tfidf", tf_exp=tf_exp, spikiness_exp=1.0, tfidf_mode=mode, tfidf_k=3)
    table = layer.collect(recipe)
    louder = replace(
        table,
        **{name: getattr(table, name) * np.float32(4) for name in ("signal_mean", "signal_max", "sample")},
    )
    one, other = (score(layer, "up_proj", recipe, t) for t in (table, louder))
    assert other == pytest.approx(one * 4**tf_exp)


@given(seeds, st.sampled_from(list(METHODS)))
def test_the_order_of_neurons_does_not_matter(seed: int, method: str) -> None:
    layer, order = random_layer(seed), np.random.default_rng(seed).permutation(7)
    recipe = Recipe(method=method, idf_exp=1.0, spikiness_exp=0.5)
    columns = {
        n: c[:, order] if c.ndim == 2 and c.shape[1] == 7 else c for n, c in layer.collect(recipe).columns().items()
    }
    weights = {n: w[:, order] if n == "down_proj" else w[order] for n, w in layer.weights.items() if n in MODULES}
    shuffled, table = Layer(weights, layer.documents), LayerStatistics.from_columns(columns)
    for module in MODULES:
        straight = score(layer, module, recipe)
        straight = straight[:, order] if module == "down_proj" else straight[order]
        assert score(shuffled, module, recipe, table) == pytest.approx(straight, rel=1e-12)


@given(seeds)
def test_rows_of_neuronrank_wanda_average_to_their_neurons_importance(seed: int) -> None:
    layer = random_layer(seed)
    for module in ("gate_proj", "up_proj"):
        flat = score(layer, module, Recipe(tf_exp=0.0))
        assert flat.mean(axis=1) == pytest.approx(np.ones(7))
        rms = np.sqrt(np.mean(np.concatenate([d.hidden for d in layer.documents]) ** 2, axis=0))
        strength = rms * np.sqrt((layer.weights["down_proj"] ** 2).sum(axis=0))
        assert score(layer, module, Recipe()).mean(axis=1) == pytest.approx(strength**0.5, rel=1e-5)


@given(seeds, ratios)
def test_stronger_neurons_keep_more_weights(seed: int, ratio: float) -> None:
    layer = random_layer(seed)
    same = np.tile(layer.weights["gate_proj"][:1], (7, 1))
    other = Layer({**layer.weights, "gate_proj": same}, layer.documents)
    recipe = Recipe(sparsity_ratio=ratio)
    kept = (~prune_mask("gate_proj", other.context(recipe))).sum(axis=1)
    importance = score(other, "gate_proj", recipe).mean(axis=1)
    assert np.all(np.diff(kept[np.argsort(importance)]) >= 0)


@given(seeds, ratios)
def test_without_its_factors_every_seed_formula_is_magnitude(seed: int, ratio: float) -> None:
    layer = random_layer(seed)
    off = {"sparsity_ratio": ratio, "tf_exp": 0.0, "idf_exp": 0.0, "magnitude_multi": 1.0, "variance_multi": 0.0}
    for module in MODULES:
        expected = mask(layer, module, method="magnitude", sparsity_ratio=ratio)
        for method in ("neuronrank_tfidf", "neuronrank_old", "neuronrank_unstructured"):
            assert np.array_equal(mask(layer, module, method=method, **off), expected)


def test_a_neuron_without_weights_or_signal_scores_zero_and_not_nan() -> None:
    layer = random_layer()
    layer.weights["gate_proj"][2] = 0
    for document in layer.documents:
        document.gate[:, 4] = 0
    for method in METHODS:
        for module in MODULES:
            assert np.isfinite(score(layer, module, Recipe(method=method, idf_exp=1.0, spikiness_exp=-1.0))).all()
    assert not score(layer, "gate_proj", Recipe())[[2, 4]].any()
