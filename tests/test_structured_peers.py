"""The peers of ``benchmarks/structured`` compute and choose what their published code does.

Needs checkouts, in FLAP_CHECKOUT (github.com/CASIA-IVA-Lab/FLAP), SHORTGPT_CHECKOUT
(github.com/sramshetty/ShortGPT) and
REPLACEME_CHECKOUT (github.com/mts-ai/ReplaceMe).
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from structured import flap as our_flap
from structured import layers as our_layers


def published(variable: str, path: str) -> Path:
    """A file of a checkout; skips the test without it."""
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable]) / path


def module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def functions(file: Path, *names: str, **known: Any) -> SimpleNamespace:
    """Some functions of a file whose imports are not installed."""
    tree = ast.parse(file.read_text("utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    space = {"torch": torch, "nn": nn, **known}
    exec(compile(tree, file, "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in names})


@pytest.fixture
def normal() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_flap_measures_what_the_published_code_does(normal: torch.Generator) -> None:
    wrapper = module(published("FLAP_CHECKOUT", "lib/layerwrapper.py")).BiasGPT
    linear = nn.Linear(12, 7, bias=False)
    theirs, ours = wrapper(linear, "WIFV"), our_flap.Fluctuation(12)
    for _ in range(5):
        inputs = torch.randn(9, 12, generator=normal) * torch.arange(1, 13) + torch.arange(12)
        theirs.add_batch(inputs[None], None)
        ours.add(inputs)
    torch.testing.assert_close(ours.mean, theirs.baseline_inp)
    torch.testing.assert_close(ours.fluctuation, theirs.fluc_inp)


def test_flap_chooses_what_the_published_lines_do(normal: torch.Generator) -> None:
    file = published("FLAP_CHECKOUT", "lib/prune.py")
    source = file.read_text("utf-8")
    # The lines of AL-AM, which stand in the middle of a function that needs CUDA and Llama's shape.
    start, end = (
        source.index("            prune_metric = torch.cat("),
        source.index("    else:\n        attn_mask = torch.stack"),
    )
    body = "\n".join(line[12:] for line in source[start:end].splitlines())
    attention, mlp = torch.randn(4, 3, generator=normal), torch.randn(4, 500, generator=normal)
    space: dict[str, Any] = {
        "torch": torch,
        "attn_metric": attention,
        "mlp_metric": mlp,
        "args": SimpleNamespace(pruning_ratio=0.3),
    }
    exec(body, space)
    # There, a head has 4 * 128 columns and a neuron 3; weights are whole numbers, since they are made like indices.
    ours = our_flap.chosen(attention, mlp, int(512 / 3), 0.3)
    for mask, theirs in zip(ours, (space["attn_mask"], space["mlp_mask"]), strict=True):
        assert torch.equal(mask, theirs)
        assert 0 < mask.sum() < mask.numel()


def test_flap_compensates_as_the_published_code_does(normal: torch.Generator) -> None:
    compress = functions(published("FLAP_CHECKOUT", "lib/prune.py"), "compress").compress
    mlp = nn.ModuleDict({name: nn.Linear(6, 10, bias=False) for name in ("gate_proj", "up_proj")})
    mlp["down_proj"] = nn.Linear(10, 6)
    nn.init.zeros_(mlp["down_proj"].bias)
    stays, mean = torch.rand(10, generator=normal) < 0.6, torch.randn(10, generator=normal)
    fresh = nn.Linear(10, 6, bias=False)
    fresh.weight = nn.Parameter(mlp["down_proj"].weight.detach().clone())
    ours = our_flap.compensated(fresh, stays, mean)
    compress(SimpleNamespace(mlp=SimpleNamespace(**mlp)), None, stays, None, mean, "cpu")
    torch.testing.assert_close(ours.weight, mlp["down_proj"].weight)
    torch.testing.assert_close(ours.bias, mlp["down_proj"].bias)


def test_block_influence_is_the_published_one(normal: torch.Generator) -> None:
    theirs = module(published("SHORTGPT_CHECKOUT", "short_gpt/metrics.py")).block_influence
    states = torch.randn(2, 3, 5, 8, generator=normal)
    states[0, 1, 2] = 0
    torch.testing.assert_close(our_layers.block_influence(*states), theirs(*states))


def test_replaceme_measures_the_published_distance(normal: torch.Generator) -> None:
    file = published("REPLACEME_CHECKOUT", "ReplaceMe/utils.py")
    theirs = functions(file, "angular_distance").angular_distance
    first, second = torch.randn(2, 7, 16, generator=normal)
    torch.testing.assert_close(our_layers.angular_distance(first, second), theirs(first, second))


@torch.no_grad()
def test_replaceme_fits_the_published_map() -> None:
    """Against the published formula, spelled out: ``inv(A'A) A'B`` with A the MLP's output, B what it has to become."""
    from tiny import tiny_model

    model = tiny_model(layers=5, hidden=16, intermediate=24, tied=False)
    sequences = torch.arange(180).reshape(4, 45) % 60
    count = 2
    dense = [our_layers.hidden_states(model, sequence)[1:] for sequence in sequences]
    last = torch.tensor(
        [[float(our_layers.angular_distance(s[i][0, -1], s[i + count][0, -1])) for i in range(3)] for s in dense]
    )
    before = int(last.mean(0).argmin())
    outputs: list[torch.Tensor] = []
    hook = model.model.layers[before].mlp.register_forward_hook(lambda *of: outputs.append(of[-1][0].double()))
    for sequence in sequences:
        model.model(sequence[None])
    hook.remove()
    a = torch.cat(outputs)
    b = a + torch.cat([(s[before + count] - s[before])[0].double() for s in dense])
    expected = (torch.linalg.inv(a.T @ a) @ (a.T @ b)).T @ model.model.layers[before].mlp.down_proj.weight.double()
    our_layers.replaceme(model, sequences, count)
    assert len(model.model.layers) == 3
    torch.testing.assert_close(model.model.layers[before].mlp.down_proj.weight.double(), expected, rtol=1e-3, atol=1e-4)
