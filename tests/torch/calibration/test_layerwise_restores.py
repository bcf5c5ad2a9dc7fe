"""The model is as it was after a run, however the run ended; nothing after the last layer runs at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layerwise import expected, run, small, text

from neuronrank_torch.calibration.layerwise import LayerRun, run_layers
from neuronrank_torch.model.structure import find_decoder


def own_forwards(model: torch.nn.Module) -> list[bool]:
    return ["forward" in layer.__dict__ for layer in model.model.layers]


def test_layers_get_their_forward_back() -> None:
    model, tokens = small("llama"), text()
    before = expected(model, tokens)
    run(model, tokens, 2)
    assert own_forwards(model) == [False] * 3
    assert torch.equal(expected(model, tokens)[-1], before[-1])


def fails_in_a_visit(model: torch.nn.Module) -> Callable[[LayerRun], None]:
    del model

    def visit(layer: LayerRun) -> None:
        if layer.index == 1:
            raise KeyboardInterrupt
        layer.feed(keep=True)

    return visit


def fails_in_a_layer(model: torch.nn.Module) -> Callable[[LayerRun], None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model.model.layers[2].mlp.register_forward_pre_hook(interrupt)
    return lambda layer: layer.feed(keep=True)


def fails_while_embedding(model: torch.nn.Module) -> Callable[[LayerRun], None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model.model.embed_tokens.register_forward_pre_hook(interrupt)
    return lambda layer: layer.feed(keep=True)


@pytest.mark.parametrize("failure", [fails_in_a_visit, fails_in_a_layer, fails_while_embedding])
@torch.no_grad()
def test_exceptions_pass_through_and_forwards_come_back(failure: Callable) -> None:
    model = small("llama")
    visit = failure(model)
    with pytest.raises(KeyboardInterrupt):
        run_layers(find_decoder(model), text(), visit)
    assert own_forwards(model) == [False] * 3


def test_a_forward_of_the_layer_s_own_is_used_and_comes_back() -> None:
    # What accelerate does to a layer that it moves between devices.
    model, tokens, calls = small("llama"), text(), []
    layer = model.model.layers[1]
    original = layer.forward

    def own(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = own
    ours = run(model, tokens, 1)
    assert layer.__dict__["forward"] is own
    assert own_forwards(model) == [False, True, False]
    assert len(calls) == len(tokens)
    assert torch.equal(ours[-1], expected(model, tokens)[-1])


def test_each_layer_runs_once_and_the_head_never() -> None:
    """Besides two batches through the first layer, which show that it does not mix sequences."""
    model, tokens = small("llama"), text()
    calls = {"norm": 0, "lm_head": 0, "mlp": 0}
    norm = model.model.norm
    for name, module in [("norm", norm), ("lm_head", model.lm_head), *[("mlp", x.mlp) for x in model.model.layers]]:
        module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    with torch.no_grad():
        run_layers(find_decoder(model), tokens, lambda layer: layer.feed(keep=True), batch_size=2)
    assert calls == {"norm": 0, "lm_head": 0, "mlp": 3 * 3 + 2}
