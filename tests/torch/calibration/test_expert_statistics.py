"""Each expert's table is the core's of the tokens that are routed to it, and of no others."""

from __future__ import annotations

import pytest
import torch
from gated import EVERYTHING, assert_agrees
from mixture import MOE, mixture, tables
from torch import Tensor, nn

from neuronrank_core import MissingStatisticsError, NonFiniteError, Recipe
from neuronrank_core.recipe import SIGNALS
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.model.structure import resolve_layer


def documents(lengths: tuple[int, ...]) -> list[Tensor]:
    """Inputs of each document, on a level of its own, so that documents go to different experts."""
    generator = torch.Generator().manual_seed(3)
    pairs = [(torch.randn(n, 32, generator=generator), torch.randn(32, generator=generator)) for n in lengths]
    return [(x + level).double() for x, level in pairs]


def double(family: str) -> nn.Module:
    """In double precision: what is small because large terms cancel agrees too."""
    model = mixture(family).double()
    model.set_experts_implementation("eager")  # The grouped one knows no double precision.
    return model


def collector(model: nn.Module, recipe: Recipe) -> LayerCollector:
    layer = resolve_layer(model.model.layers[0], 0)
    return LayerCollector(layer, layer.blocks(), recipe)


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("signal", SIGNALS)
@torch.no_grad()
def test_ragged_documents(family: str, signal: str) -> None:
    model, texts = double(family), documents((1, 5, 40, 13))
    chosen = Recipe(**EVERYTHING, signal=signal, threshold=0.2, tokens_per_document=6)
    with collector(model, chosen) as c:
        for number, x in enumerate(texts):
            model.model.layers[0].mlp(x[None])
            c.add_documents(number, len(x))
    expected = tables(model, 0, [x.numpy() for x in texts], chosen)
    # Two experts a token: one token is a document to two experts, and none at all to the others.
    assert sum(t.tokens.sum() for t in expected.values()) == 2 * sum(map(len, texts))
    assert any(0 not in table.document for table in expected.values())
    for expert, table in enumerate(c.statistics()):
        assert_agrees(table, expected[expert])


@torch.no_grad()
def test_documents_of_a_micro_batch_are_kept_apart() -> None:
    model, texts = double("mixtral"), documents((9, 9, 9))
    with collector(model, Recipe(**EVERYTHING)) as c:
        model.model.layers[0].mlp(torch.stack(texts[:2]))
        c.add_documents(0, 9)
        model.model.layers[0].mlp(torch.stack(texts[2:]))
        c.add_documents(2, 9)
    expected = tables(model, 0, [x.numpy() for x in texts], Recipe(**EVERYTHING))
    found = c.statistics()
    for expert, table in expected.items():
        assert_agrees(found[expert], table)


@torch.no_grad()
def test_an_expert_without_tokens_has_no_table() -> None:
    model = double("qwen3_moe")
    with collector(model, Recipe()) as c:
        model.model.layers[0].mlp(documents((1,))[0][None])
        c.add_documents(0, 1)
    assert sum(table is not None for table in c.statistics()) == 2


@torch.no_grad()
def test_hooks_are_there_inside_alone_and_change_nothing() -> None:
    model, x = double("mixtral"), documents((20,))[0][None]
    block = model.model.layers[0].mlp
    expected = block(x)
    with collector(model, Recipe(**EVERYTHING)) as c:
        assert torch.equal(block(x), expected)
        c.add_documents(0, 20)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(MissingStatisticsError, match="layer 0: MixtralExperts was not called"):
        c.add_documents(1, 20)


@torch.no_grad()
def test_errors_name_the_expert() -> None:
    model = double("mixtral")
    model.model.layers[0].mlp.experts.gate_up_proj[3] = float("nan")
    with collector(model, Recipe(**EVERYTHING)) as c:
        model.model.layers[0].mlp(documents((40,))[0][None])
        with pytest.raises(NonFiniteError, match="of layer 0 expert 3"):
            c.add_documents(0, 40)
