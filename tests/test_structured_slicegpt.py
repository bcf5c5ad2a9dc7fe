"""SliceGPT as a peer: what its published code computes, the size asked for, and a model that runs."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from structured import slicegpt

CHECKOUT = os.environ.get("SLICEGPT_CHECKOUT")


@pytest.fixture
def sequences() -> Tensor:
    """Random tokens."""
    return torch.randint(258, (3, 40), generator=torch.Generator().manual_seed(1))


def outside(model: Any) -> int:
    """Number of parameters outside the embeddings."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("model.embed", "lm_head")))


def published(model: Any, sequences: Tensor, width: int) -> Any:
    """The model that the published code slices to a width, and its layers by themselves."""
    if "slicegpt" not in sys.modules:  # Its own __init__ wants data sets, and models that transformers no longer has.
        for name, path in (("slicegpt", ""), ("slicegpt.adapters", "/adapters")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [f"{CHECKOUT}/src/slicegpt{path}"]
        sys.modules["ml_collections"] = types.SimpleNamespace(ConfigDict=types.SimpleNamespace)  # type: ignore[assignment]
    llama, fusion, rotate, scheduler = (
        importlib.import_module(f"slicegpt.{name}")
        for name in ("adapters.llama_adapter", "layernorm_fusion", "rotate", "slicing_scheduler")
    )
    model.config.torch_dtype = torch.float32
    adapter = llama.LlamaModelAdapter(model)
    fusion.replace_layers(adapter)
    for layer in model.model.layers:  # Its layer is of an older transformers: three results here, a tuple there.
        layer.self_attn.register_forward_hook(lambda _, __, out: (*out, None))
        layer.register_forward_hook(lambda _, __, out: out[0])
    fusion.fuse_modules(adapter)
    batches = [{"input_ids": x[None]} for x in sequences]
    rotate.rotate_and_slice(
        adapter, batches, scheduler.ConstSlicingScheduler(width), apply_mask=False, final_orientation="pca"
    )
    return model


@pytest.mark.skipif(not CHECKOUT, reason="SLICEGPT_CHECKOUT is not set to a checkout of TransformerCompression")
def test_the_published_code_slices_to_the_same_model(sequences: Tensor) -> None:
    """Signs of components are arbitrary, so absolute weights are compared, and the logits of new tokens.

    The embeddings are centred and the epsilon is 1e-5 beforehand: their code does so for every model.
    """
    dense = tiny_model("llama", layers=2)
    dense.model.embed_tokens.weight.data -= dense.model.embed_tokens.weight.data.mean(dim=1, keepdim=True)
    for module in dense.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5
    ours, theirs = copy.deepcopy(dense), published(copy.deepcopy(dense), sequences, 40)
    slicegpt.slice_to(ours, sequences, 40)
    renamed = {name.replace("shortcut_Q", "shortcut"): value for name, value in theirs.state_dict().items()}
    assert ours.state_dict().keys() == renamed.keys()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value.abs(), renamed[name].abs(), rtol=1e-3, atol=1e-4, msg=name)
    new = sequences.flip(0, 1)
    torch.testing.assert_close(ours(new).logits, theirs(new, use_cache=False).logits, rtol=1e-3, atol=1e-3)


def test_without_slicing_the_logits_are_those_of_the_dense_model(sequences: Tensor) -> None:
    model = tiny_model("llama", layers=3)
    before = model(sequences).logits
    slicegpt.slice_to(model, sequences, 64)
    torch.testing.assert_close(model(sequences).logits, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5])
def test_the_size_is_just_below_the_target_and_the_model_runs(keep: float, sequences: Tensor) -> None:
    model = tiny_model("llama", layers=3)
    dense = outside(model)
    width = slicegpt.width_for(model, keep)
    wider = slicegpt.sliced_size(model, width + 1)
    slicegpt.prune(model, sequences, keep)
    assert outside(model) <= keep * dense < wider
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.model.embed_tokens.weight.shape[1] == width
    slicegpt.slice_to(other := tiny_model("llama", layers=3), sequences, width + 1)
    assert outside(other) == wider
    assert model.generate(sequences[:, :5], max_new_tokens=3, do_sample=False).shape == (3, 8)


def test_norms_after_the_blocks_are_refused(sequences: Tensor) -> None:
    with pytest.raises(NotImplementedError, match="after each block"):
        slicegpt.prune(tiny_model("gemma3"), sequences, 0.8)


def test_a_norm_with_a_gain_cannot_be_rotated() -> None:
    """Why: rotating what a block writes commutes with the norm after it only while all gains are equal."""
    norm = tiny_model("gemma3").model.layers[0].post_attention_layernorm
    generator = torch.Generator().manual_seed(0)
    written = torch.randn(5, 64, generator=generator)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    assert (norm(written @ rotation) - norm(written) @ rotation).abs().max() > 0.1
    norm.weight.data.fill_(0.7)
    torch.testing.assert_close(norm(written @ rotation), norm(written) @ rotation)
