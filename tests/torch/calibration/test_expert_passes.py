"""How often the experts of a layer run: once for calibration or not at all, and once for the next layer."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from experts import FAMILIES
from pruning import pruned, random_model, recipe

from neuronrank_torch.model.structure import resolve_layer

#: Many, since checks of the model run a few sequences more.
DOCUMENTS, LENGTH = 24, 32


@pytest.mark.parametrize(
    ("family", "options", "passes"),
    [
        ("mixtral", {"sparsity_type": "experts", "method": "reap", "sparsity_ratio": 0.4}, [2, 2, 1]),
        ("mixtral", {"method": "wanda"}, [1, 1, 0]),
        ("mixtral", {"method": "wanda", "propagate": "dense"}, [1, 1, 1]),
        # Its shared expert is calibrated in the same pass, and may run after the others.
        ("qwen2_moe", {"method": "wanda"}, [2, 2, 1]),
    ],
)
def test_passes_through_the_experts(family: str, options: dict[str, Any], passes: list[int]) -> None:
    model = random_model(copy.deepcopy(FAMILIES[family][0]))
    seen = [0, 0, 0]
    for layer, module in enumerate(model.model.layers):
        experts = module.mlp.experts

        def counting(x: Any, chosen: Any, factors: Any, layer: int = layer, forward: Any = experts.forward) -> Any:
            seen[layer] += chosen.numel()
            return forward(x, chosen, factors)

        experts.forward = counting
    pruned(model, recipe(**options, nsamples=DOCUMENTS, seqlen=LENGTH))
    whole = DOCUMENTS * LENGTH * FAMILIES[family][0].num_experts_per_tok
    assert [pairs // whole for pairs in seen] == passes


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "glm4_moe"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@torch.no_grad()
def test_what_the_experts_return_stays(family: str, implementation: str) -> None:
    model = random_model(copy.deepcopy(FAMILIES[family][0]))
    model.set_experts_implementation(implementation)
    index, module = next((i, m) for i, m in enumerate(model.model.layers) if hasattr(m.mlp, "experts"))
    found = resolve_layer(module, index).experts
    assert found is not None
    x = torch.randn(23, 32, generator=torch.Generator().manual_seed(0))
    chosen = torch.stack([torch.randperm(found.count)[:2] for _ in x])
    factors = torch.rand(23, 2, generator=torch.Generator().manual_seed(1))
    plain = module.mlp.experts(x, chosen, factors)
    hooks = found.on_contributions(lambda *seen: None)
    names = [*inspect.signature(module.mlp.experts.forward).parameters]
    by_keyword = dict(zip(names, (x, chosen, factors), strict=True))
    for output in (module.mlp.experts(x, chosen, factors), module.mlp.experts(**by_keyword)):
        torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-5)
    for hook in hooks:
        hook.remove()
    assert torch.equal(module.mlp.experts(x, chosen, factors), plain)
