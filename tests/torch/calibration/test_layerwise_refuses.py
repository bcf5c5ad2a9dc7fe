"""One call stands for all sequences, so what a model hands its layers must not depend on the text."""

from __future__ import annotations

import pytest
import torch
from layerwise import expected, run, small, text
from pruning import pruned, recipe, same_state, state
from tiny import tiny_model
from tiny_types import randomise, tiny_type, tiny_type_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from neuronrank_core import InputError
from neuronrank_core.errors import UnsupportedModelError
from neuronrank_torch.calibration.layerwise import embed, run_layers
from neuronrank_torch.model.structure import find_decoder


class TextDependent(nn.Module):
    """Rotary embeddings that look at the hidden states."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(hidden, *args, **kwargs)
        return cos, sin + hidden.mean()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_arguments_that_depend_on_the_text_are_refused(family: str) -> None:
    model = small(family)
    model.model.rotary_emb = TextDependent(model.model.rotary_emb)
    name = type(model.model).__name__
    with pytest.raises(InputError, match=f"^{name} passes its layers arguments that depend on the text"):
        run_layers(find_decoder(model), text(), lambda layer: layer.feed(keep=True))
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


@torch.no_grad()
def test_the_same_text_throughout_is_fine() -> None:
    model, tokens = small("llama"), text(1)
    model.model.rotary_emb = TextDependent(model.model.rotary_emb)
    hidden = embed(find_decoder(model), tokens.repeat(3, 1))
    assert torch.equal(hidden[0], hidden[2])


@pytest.mark.parametrize(
    "change",
    [
        lambda tokens: {"extra": tokens.float()},
        lambda tokens: {"extra": {"nested": [tokens]}},
        lambda tokens: {"extra": (None if tokens[0, 0] > 100 else tokens[:, :1] * 0)},
        lambda tokens: {"extra": int(tokens[0, 0])},
        lambda tokens: {"extra": [0] * int(tokens[0, 0])},
        lambda tokens: {"extra": torch.zeros(int(tokens[0, 0]) + 1)},
        lambda tokens: {f"extra{tokens[0, 0]}": None},
    ],
)
@torch.no_grad()
def test_wherever_they_hide(change) -> None:
    model, tokens = small("llama"), text()
    tokens[:, 0] = torch.tensor([3, 200, 5, 6, 7])

    class Body(type(model.model)):
        def forward(self, input_ids: Tensor, **kwargs: object) -> object:
            return super().forward(input_ids=input_ids, **kwargs, **change(input_ids))

    model.model.__class__ = Body
    with pytest.raises(InputError, match="depend on the text"):
        embed(find_decoder(model), tokens)


@pytest.mark.parametrize("error", [TypeError, ValueError])
@torch.no_grad()
def test_a_model_that_needs_more_than_tokens_is_refused(error: type[Exception]) -> None:
    model = small("llama")

    class Seeing(type(model.model)):
        def forward(self, input_ids: Tensor, **kwargs: object) -> object:
            del input_ids, kwargs
            raise error("pixel_values is missing\nsecond line")

    model.model.__class__ = Seeing
    with pytest.raises(InputError, match=r"^Seeing does not run on tokens alone: pixel_values is missing$"):
        embed(find_decoder(model), text())
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def test_layers_that_mix_sequences_run_alone_or_not_at_all() -> None:
    """The router of Doge's experts reads all sequences of a batch as one."""
    model, tokens = tiny_type("doge+experts"), text()
    for ours, theirs in zip(run(model, tokens, 1), expected(model, tokens), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedModelError, match=r"^DogeModel mixes the sequences of a batch$") as caught:
        run(model, tokens, 2)
    assert caught.value.hint == "use --batch-size 1"


def test_nothing_is_pruned_before_a_later_layer_mixes_sequences() -> None:
    class Mixing(nn.Module):
        def forward(self, gate: Tensor) -> Tensor:
            return gate + gate.mean(0)

    model = small("llama")
    model.model.layers[1].mlp.act_fn = Mixing()
    dense = state(model)
    with pytest.raises(UnsupportedModelError, match=r"^LlamaModel mixes the sequences of a batch$"):
        pruned(model, recipe(), batch_size=2)
    assert same_state(state(model), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_rounding_is_not_mixing(dtype: torch.dtype) -> None:
    """Experts that get other tokens, in half precision; and a rank without text."""
    decoder = find_decoder(tiny_model("mixtral", layers=2, hidden=32, intermediate=48).to(dtype))
    for tokens in (text(), text()[:0]):
        run_layers(decoder, tokens, lambda layer: layer.feed(keep=True), batch_size=4)


class Some(nn.ModuleList):
    """Layers of which the model calls some."""

    called = slice(None)

    def __getitem__(self, index: object) -> object:
        return list(self)[self.called] if isinstance(index, slice) else super().__getitem__(index)


@pytest.mark.parametrize(("called", "count"), [(slice(0, 2), 2), (slice(0, 3, 2), 2), (slice(2, 3), 1)])
@torch.no_grad()
def test_layers_that_are_not_called_are_counted(called: slice, count: int) -> None:
    model = small("llama")
    model.model.layers = Some(model.model.layers)
    model.model.layers.called = called
    with pytest.raises(UnsupportedModelError, match=rf"^LlamaModel called {count} of its 3 layers$"):
        run_layers(find_decoder(model), text(), lambda layer: layer.feed(keep=True))
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


@pytest.mark.parametrize("batch_size", [1, 5])
@torch.no_grad()
def test_keys_and_values_that_later_layers_share_are_refused(batch_size: int) -> None:
    config = tiny_type_config("gemma4_unified_text")
    config.num_hidden_layers, config.num_kv_shared_layers = 4, 2
    config.layer_types = ["sliding_attention", "full_attention"] * 2
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    with pytest.raises(UnsupportedModelError, match="passes more than hidden states from layer to layer"):
        run(model, text(), batch_size)
    config.num_kv_shared_layers = 0
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    for layerwise, whole in zip(run(model, text(), batch_size), expected(model, text()), strict=True):
        torch.testing.assert_close(layerwise, whole, rtol=1e-3, atol=1e-3)
