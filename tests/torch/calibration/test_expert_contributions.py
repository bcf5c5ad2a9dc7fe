"""What whole experts add, collected by hooks, against each family's router and experts written out in NumPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from experts import FAMILIES
from mixture import Array, silu
from pruning import random_model, recipe
from torch import Tensor

from neuronrank_core import LayerStatistics, MissingStatisticsError, NonFiniteError, merge
from neuronrank_core.statistics.experts import expert_statistics, expert_sums
from neuronrank_torch import kernels
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.model.mixture import Mixture
from neuronrank_torch.model.structure import resolve_layer

#: Two documents of one micro-batch, of 19 tokens each.
DOCUMENTS, LENGTH = 3, 19
CHOSEN = recipe(sparsity_type="experts", method="neuronrank_tfidf", tfidf_mode="topic", tokens_per_document=7)
LIMIT, ALPHA = 7.0, 1.702


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def softmax(x: Array) -> Array:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def gates(family: str, block: Any, x: Array) -> dict[int, float]:
    """The experts of a token, each with the factor of its output."""
    if family == "gpt_oss":
        logits = array(block.router.weight) @ x + array(block.router.bias)
        best = np.argsort(-logits)[:2]
        return dict(zip(best.tolist(), softmax(logits[best]), strict=True))
    logits = array(block.gate.weight) @ x
    if family == "deepseek":
        scores = 1 / (1 + np.exp(-logits))
        rated = scores + array(block.gate.e_score_correction_bias)
        first = np.sort(rated[:4])[-2:].sum() > np.sort(rated[4:])[-2:].sum()
        rated[4 if first else 0 : 8 if first else 4] = -np.inf
        best = np.argsort(-rated)[:2]
        factors = scores[best] / scores[best].sum() * block.gate.routed_scaling_factor
    else:
        top = 3 if family == "olmoe" else 2
        best, factors = np.argsort(-logits)[:top], np.sort(softmax(logits))[::-1][:top]
        if family in ("mixtral", "qwen3_moe"):  # Qwen2-MoE and OLMoE do not normalise.
            factors = factors / factors.sum()
    return dict(zip(best.tolist(), factors.tolist(), strict=True))


def output(family: str, experts: Any, e: int, x: Array) -> Array:
    both, down = array(experts.gate_up_proj[e]), array(experts.down_proj[e])
    if family == "gpt_oss":
        both = x @ both + array(experts.gate_up_proj_bias[e])
        gate, up = np.minimum(both[::2], LIMIT), np.clip(both[1::2], -LIMIT, LIMIT)
        return (up + 1) * gate / (1 + np.exp(-ALPHA * gate)) @ down + array(experts.down_proj_bias[e])
    half = len(both) // 2
    return down @ (silu(both[:half] @ x) * (both[half:] @ x))


def expected(family: str, block: Any, texts: Tensor) -> LayerStatistics:
    rows = []
    for number, document in enumerate(array(texts)):
        gate, norm = (np.zeros((LENGTH, len(block.experts.down_proj))) for _ in range(2))
        for t, x in enumerate(document):
            for e, factor in gates(family, block, x).items():
                gate[t, e], norm[t, e] = factor, np.linalg.norm(output(family, block.experts, e, x))
        row = expert_statistics(number, norm > 0, gate, norm, document, tokens_per_document=7)
        rows.append(row)
    return merge(rows)


def with_experts(family: str) -> tuple[Any, Any]:
    model = random_model(copy.deepcopy(FAMILIES[family][0])).double()
    model.set_experts_implementation("eager")  # The grouped one knows no double precision.
    return next((m, i) for i, m in enumerate(model.model.layers) if hasattr(m.mlp, "experts"))


def collector(module: Any, index: int, **chosen: Any) -> LayerCollector:
    layer = resolve_layer(module, index)
    block = Mixture.of(layer)
    assert block is not None
    return LayerCollector(layer, [block], recipe(**{**vars(CHOSEN), **chosen}), LENGTH)


def documents() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    level = 2 * torch.randn(DOCUMENTS, 1, 32, generator=generator)
    return (torch.randn(DOCUMENTS, LENGTH, 32, generator=generator) + level).double()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "glm4_moe"])
@torch.no_grad()
def test_the_table_is_the_core_s_of_the_experts_written_out(family: str) -> None:
    (module, index), texts = with_experts(family), documents()
    plain = module.mlp(texts)
    with collector(module, index) as c:
        found_output = module.mlp(texts[:2])
        c.add_documents(0, LENGTH)
        module.mlp(texts[2:])
        c.add_documents(2, LENGTH)
    both = (of[0] if isinstance(of, tuple) else of for of in (plain, found_output))
    dense, seen = both
    torch.testing.assert_close(seen, dense[:2])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    [found] = c.statistics()
    wanted = expected(family, module.mlp, texts).columns()
    assert found is not None
    assert found.columns().keys() == wanted.keys()
    assert (wanted["expert_tokens"] != wanted["expert_tokens"][0]).any(), "documents differ"
    for name, column in wanted.items():
        np.testing.assert_allclose(found.columns()[name], column, rtol=1e-5, atol=1e-7, err_msg=name)


@torch.no_grad()
def test_sums_alone_where_no_topics_are_asked_for() -> None:
    module, index = with_experts("mixtral")
    with collector(module, index, method="reap", tfidf_mode="doc") as c:
        module.mlp(documents())
        c.add_documents(0, LENGTH)
    [found] = c.statistics()
    assert found is not None
    assert not any("sample" in name for name in found.columns())


@torch.no_grad()
def test_errors_name_the_layer() -> None:
    module, index = with_experts("mixtral")
    with collector(module, index) as c:
        with pytest.raises(MissingStatisticsError, match="layer 0: MixtralExperts was not called"):
            c.add_documents(0, LENGTH)
        module.mlp.experts.down_proj[2] = float("nan")
        module.mlp(documents())
        with pytest.raises(NonFiniteError, match="experts of layer 0"):
            c.add_documents(0, LENGTH)


def test_the_kernel_is_the_core_s() -> None:
    generator = torch.Generator().manual_seed(0)
    routed = torch.rand(2, 11, 5, generator=generator) < 0.4
    gate, norm = (torch.rand(2, 11, 5, generator=generator) * routed for _ in range(2))
    found = kernels.expert_sums(routed, gate, norm)
    for document in range(2):
        wanted = expert_sums(routed[document].numpy(), gate[document].numpy(), norm[document].numpy())
        assert found.keys() == wanted.keys()
        for name, column in wanted.items():
            np.testing.assert_allclose(found[name][document].numpy(), column, rtol=1e-6, err_msg=name)
