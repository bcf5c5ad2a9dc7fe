"""Layer by layer is the model's own forward: the same hidden states before, between and after the layers."""

from __future__ import annotations

import pytest
import torch
from layerwise import FAMILIES, expected, run, small, text
from tiny import Family
from tiny_types import tiny_type

from neuronrank_torch.calibration.layerwise import embed, run_layers, split_output
from neuronrank_torch.model.structure import find_decoder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 5])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_are_those_of_the_model(family: Family, batch_size: int, attention: str) -> None:
    model, tokens = small(family), text()
    model.set_attn_implementation(attention)
    ours, theirs = run(model, tokens, batch_size), expected(model, tokens)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        if batch_size == 1:
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_the_sliding_window_is_at_work(family: Family) -> None:
    model, tokens = small(family), text()
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    model.config.sliding_window = 1000
    wide = run(model, tokens, 2)
    assert not torch.allclose(wide[-1], expected(small(family), tokens)[-1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_what_enters_the_first_layer(family: Family) -> None:
    model, tokens = small(family), text()
    with torch.no_grad():
        assert torch.equal(embed(find_decoder(model), tokens), expected(model, tokens)[0])


def test_arguments_are_those_of_the_whole_model() -> None:
    """Gemma 3 with pictures makes the masks itself; its text model would make others."""
    model, tokens = tiny_type("gemma3+bidirectional"), text()
    for ours, theirs in zip(run(model, tokens, 2), expected(model, tokens), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_keep_hidden_states_stay() -> None:
    model, tokens = small("llama"), text()
    with torch.no_grad():
        before = embed(find_decoder(model), tokens)
        after = run_layers(find_decoder(model), tokens, lambda layer: layer.feed(keep=False), batch_size=2)
    assert torch.equal(before, after)


@pytest.mark.parametrize(("batch_size", "firsts"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (5, [0]), (99, [0])])
def test_after_hears_of_every_micro_batch(batch_size: int, firsts: list[int]) -> None:
    heard: list[int] = []
    with torch.no_grad():
        run_layers(
            find_decoder(small("llama")),
            text(),
            lambda layer: layer.feed(keep=True, after=heard.append),
            batch_size=batch_size,
        )
    assert heard == firsts * 3


def test_half_precision_stays_half() -> None:
    model, tokens = small("llama").bfloat16(), text()
    ours, theirs = run(model, tokens, 1), expected(model, tokens)
    assert ours[-1].dtype == torch.bfloat16
    assert torch.equal(ours[-1], theirs[-1])


@pytest.mark.parametrize("kind", [tuple, list])
def test_what_a_layer_returns_is_split(kind: type) -> None:
    hidden, weights = torch.ones(1, 2, 3), torch.zeros(1)
    assert split_output(hidden) == (hidden, None)
    first, others = split_output(kind([hidden, weights, None]))
    assert first is hidden
    assert others == (weights, None)
    assert split_output(kind([hidden])) == (hidden, ())
