"""Mixes that reach a target size: counted by hand, and against every width by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronrank_core import InvalidValueError, Recipe
from neuronrank_core.mixes import Sizes, Target, described, mixes, passes, rehearsed, width_multiple

#: SmolLM2-135M: the layers have 3,540,096 parameters, and there is a last norm.
SMOL = Sizes(
    parameters=30 * 3_540_096 + 576,
    layers=30,
    layer=3_540_096,
    neurons=1536,
    neuron=3 * 576,
    heads={"query-heads": (1, 3, 221_184), "key-value-groups": (1, 3, 294_912)},
)
RECIPE = Recipe(sparsity_type="neurons", update="least-squares")


def parameters(sizes: Sizes, mix: dict[str, tuple[int, int]]) -> int:
    """The parameters of a model without a mix, layer by layer."""
    stay = sizes.layers - mix.get("layers-by-influence", (0, 0))[0]
    own = sizes.layer
    for kind, (goes, _) in mix.items():
        own -= {"neurons": goes * sizes.neuron}.get(kind, sizes.heads[kind][2] if kind in sizes.heads else 0)
    return sizes.parameters - sizes.layers * sizes.layer + stay * own


def test_smollm2_by_hand() -> None:
    # One step of 64 neurons would be 3.1 % of the parameters, one of 32 is 1.6 %.
    assert width_multiple(SMOL, RECIPE) == 32
    found = {name: described(mix) for name, mix in mixes(SMOL, 0.8, RECIPE).items()}
    assert found == {
        "neurons": "416 of 1536 neurons of each layer",
        "query-heads, neurons": "1 of 3 query heads of each group + 288 of 1536 neurons of each layer",
        "key-value-groups, neurons": "1 of 3 key-value groups + 256 of 1536 neurons of each layer",
        "layers, neurons": "6 of 30 layers + 32 of 1536 neurons of each layer",
        "neurons, layers": "3 of 30 layers + 256 of 1536 neurons of each layer",
    }


@given(
    share=st.floats(0.05, 0.98),
    layers=st.integers(1, 12),
    neurons=st.integers(1, 300),
    neuron=st.integers(1, 40),
    other=st.integers(1, 4000),
    multiple=st.sampled_from([None, 1, 8, 64]),
)
def test_every_mix_lands_between_target_and_slack(
    share: float, layers: int, neurons: int, neuron: int, other: int, multiple: int | None
) -> None:
    layer = neurons * neuron + other
    sizes = Sizes(layers * layer + 7, layers, layer, neurons, neuron, {"query-heads": (1, 2, other // 3)})
    recipe = Recipe(sparsity_type="neurons", multiple_of=multiple)
    for mix in mixes(sizes, share, recipe).values():
        assert share - 0.02 - 1e-12 <= parameters(sizes, mix) / sizes.parameters <= share + 1e-12
        goes = mix.get("neurons", (0, 0))[0]
        assert 0 <= goes < neurons
        assert not goes or (neurons - goes) % width_multiple(sizes, recipe) == 0
    step = width_multiple(sizes, recipe)
    fits = [
        width
        for width in range(step, neurons, step)
        if (share - 0.02) <= (sizes.parameters - layers * (neurons - width) * neuron) / sizes.parameters <= share
    ]
    found = mixes(sizes, share, recipe).get("neurons")
    assert (found is not None) == bool(fits)
    if found:
        assert neurons - found["neurons"][0] == max(fits)


def test_passes_remove_layers_first_and_exactly_so_many() -> None:
    mix = mixes(SMOL, 0.8, RECIPE)["neurons, layers"]
    first, second = passes(mix, Recipe(sparsity_type="neurons", multiple_of=32, nsamples=100))
    assert (first.sparsity_type, int(first.ratio * 30)) == ("layers-by-influence", 3)
    assert (second.sparsity_type, int(second.ratio * 1536), second.multiple_of) == ("neurons", 256, None)
    assert [one.nsamples for one in rehearsed([first, Recipe(nsamples=6), Recipe(nsamples=20)])] == [25, 6, 8]


def test_what_the_model_does_not_allow_is_not_in_a_mix() -> None:
    assert set(mixes(Sizes(1000, 10, layer=100), 0.9, RECIPE)) == {"layers, neurons"}
    assert mixes(Sizes(1000, 10, layer=100), 0.95, RECIPE) == {}  # One layer is too much, none is not enough.


@pytest.mark.parametrize("values", [{}, {"target_params": 0.8, "max_loss": 0.1}])
def test_a_target_is_a_size_or_a_loss(values: dict[str, float]) -> None:
    with pytest.raises(InvalidValueError, match="if and only if target_params is not set"):
        Target(**values)
