"""The sweep over model types on some of them, and that it sees what it is there for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from neuronrank_core.errors import UnsupportedModelError
from neuronrank_torch import kernels
from neuronrank_torch.calibration import layerwise
from neuronrank_torch.model import experts, structure
from neuronrank_torch.pruning.sparsity_types.neurons import Neurons
from neuronrank_torch.pruning.sparsity_types.weights import Weights


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("model_types")


@pytest.mark.parametrize(
    ("model_type", "masks", "columns"),
    [
        ("llama", "6 + 0", ["yes"] * 5),
        ("phi3", "4 + 0", ["yes", "yes", "yes", "refused", "yes"]),
        ("mixtral", "0 + 16", ["yes"] * 5),
        ("gpt_oss", "0 + 16", ["yes"] * 5),
        ("llama4_text", "6 + 16", ["yes", "refused", "yes", "yes", "yes"]),
        ("minimax_m3_vl_text", "4 + 16", ["yes"] * 5),
        ("aria", "6 + 14", ["yes", "yes", "yes", "yes", "-"]),
        ("step3p7", "6 + 8", ["yes", "yes", "refused", "yes", "-"]),
        ("nemotron_h_omni", "2 + 8", ["yes", "refused", "refused", "refused", "-"]),
    ],
)
def test_a_type_that_is_pruned(sweep: ModuleType, model_type: str, masks: str, columns: list[str]) -> None:
    result = sweep.examined(model_type)
    assert (result.outcome, result.problems, result.line) == ("pruned", [], "")
    assert result.columns["masks"] == masks
    assert [result.columns[name].partition(":")[0] for name in sweep.COLUMNS] == columns


def test_the_types_are_all_that_read_text(sweep: ModuleType) -> None:
    assert len(sweep.TYPES) > 200
    assert {"llama", "phi3", "mixtral", "opt", "llava"} <= {*sweep.TYPES}


def test_a_type_that_is_not_supported(sweep: ModuleType) -> None:
    result = sweep.examined("inkling_text")
    assert (result.outcome, result.problems) == ("refused", [])
    assert sweep.group(result) == "experts in another layout"


def test_the_layout_of_a_type_is_told(sweep: ModuleType) -> None:
    result = sweep.examined("opt")
    assert (result.outcome, result.problems) == ("pruned", [])
    assert result.layout == ["fc1", "fc2"]


def other_input(forward: Any, device: Any, args: Any, kwargs: Any, hidden: Tensor) -> Any:
    output = forward(hidden.to(device), *args, **kwargs)
    return output * 1.01


def one_expert_less(self: Any, index: int) -> Any:
    return whole(self, index)[1:]


whole = experts.Experts.mlps
remove = Weights.remove


def attention_too(self: Any, block: Any, *rest: Any) -> Any:
    if block.where == 1:
        LAYERS[1].attention.projections["q_proj"].weight[0, 0] = 9.0
    return remove(self, block, *rest)


LAYERS: list[Any] = []
resolve = structure.resolve_layer


def remembered(module: Any, index: int) -> Any:
    layer = resolve(module, index)
    LAYERS[index:] = [layer]
    return layer


def down_left(self: Any, block: Any, *rest: Any) -> Any:
    dense = block.projections["down_proj"].weight.clone()
    masks = remove(self, block, *rest)
    block.projections["down_proj"].weight.copy_(dense)
    return masks


def lines(*_: Any) -> Any:
    raise UnsupportedModelError("one\ntwo")


def surprised(*_: Any) -> Any:
    raise KeyError("surprise")


def endless(*_: Any) -> Any:
    while True:
        pass


@pytest.mark.parametrize(
    ("model_type", "patches", "outcome", "problem"),
    [
        ("llama", [(Weights, "remove", down_left)], "wrong", "left dense: 0.mlp.down_proj"),
        ("mixtral", [(experts.Experts, "mlps", one_expert_less)], "wrong", "left dense: 0.mlp.experts.gate_up_proj"),
        (
            "llama",
            [(structure, "resolve_layer", remembered), (Weights, "remove", attention_too)],
            "wrong",
            "changed: model.layers.1.self_attn.q_proj.weight",
        ),
        ("llama", [(layerwise, "_call", other_input)], "wrong", "hidden states before layer 1"),
        ("llama", [(kernels, "mean_square", lambda x: x.float().mean(1).square())], "wrong", "against Wanda's score"),
        (
            "mixtral",
            [(kernels, "mean_square", lambda x: x.float().mean(1).square())],
            "wrong",
            "experts.gate_up_proj[0]",
        ),
        ("llama", [(structure, "resolve_layer", lines)], "wrong", "several lines"),
        ("llama", [(structure, "resolve_layer", surprised)], "crash", "KeyError"),
    ],
    ids=["down", "expert", "attention", "hidden", "score", "experts' score", "lines", "surprise"],
)
def test_what_is_wrong_is_seen(
    sweep: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    patches: list[tuple[Any, str, Callable[..., Any]]],
    outcome: str,
    problem: str,
) -> None:
    for owner, name, act in patches:
        monkeypatch.setattr(owner, name, act)
    result = sweep.examined(model_type, columns=())
    assert result.outcome == outcome
    assert problem in f"{result.problems} {result.line}"


def test_a_hang_is_seen(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "resolve_layer", endless)
    monkeypatch.setattr(sweep, "SECONDS", 1)
    result = sweep.examined("llama")
    assert (result.outcome, result.line) == ("crash", "crash: more than 1 s")


def test_a_configuration_that_says_otherwise_is_seen(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Neurons, "change_config", lambda self, decoder: None)
    result = sweep.examined("llama", columns=("neurons",))
    assert result.outcome == "pruned"
    assert result.columns["neurons"].startswith("crash")


def test_the_page_has_every_type_and_no_other_cells(sweep: ModuleType) -> None:
    results = [
        sweep.Result("a", "pruned", columns={"masks": "6", "2:4": "yes", "neurons": "wrong: it | is"}),
        sweep.Result("b", "refused", "no\tgated MLP", layout=["fc1", "fc2"]),
        sweep.Result("c", "crash", "KeyError: <x>"),
    ]
    page = sweep.page(results, date(2026, 11, 26))
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.replace("\\|", "").count("|") for row in rows] == [len(sweep.COLUMNS) + 4] * 3
    assert "| refused | 1 | 0 |" in page
    assert "neurons wrong: it \\| is" in page
    assert "| fc1, fc2 | 1 | b |" in page
