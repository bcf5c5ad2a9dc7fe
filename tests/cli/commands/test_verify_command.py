"""``neuronrank verify``: the table, the exit code, the flags."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from command import LAYERS, Run

import neuronrank_torch.runs.verify.run
from neuronrank_cli import console
from neuronrank_cli.commands.verify import verify
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.runs.verify.verify_result import VerifyResult


@pytest.fixture
def tiny(small: list[object]) -> list[object]:
    return [*small, "--device", "cpu"]


def rows(shown: str) -> dict[str, list[str]]:
    cells = ([c.strip() for c in line.strip("│").split("│")] for line in shown.splitlines() if line.startswith("│"))
    return {name: rest for name, *rest in cells}


def test_the_table_of_a_sound_backend(run: Run, tiny: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    result = run("verify", *tiny, "--layers", 2)
    assert result.stdout.splitlines()[0].endswith(f"2 layers, torch {torch.__version__}")
    assert result.stdout.splitlines()[-1] == "verdict: the contract holds"
    table = rows(result.stdout)
    assert {"signal_mean", "open_gate", "topics", "df", "tf", "idf", "up_proj scores", "down_proj mask"} <= table.keys()
    assert all(row[-1] == "holds" for row in table.values())
    assert re.fullmatch(r"\de-0\d|\d\.\de-0[6-9]", table["gate_proj scores"][0])
    assert table["gate_proj mask"][0] == "0 of 2,048"
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80
    assert result.stderr.splitlines()[1:] == ["verifying layer 1 of 2", "verifying layer 2 of 2"]


def test_a_broken_kernel_ends_in_exit_code_1_and_a_table_that_names_it(
    run: Run, tiny: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = TorchKernels.column_norm
    monkeypatch.setattr(TorchKernels, "column_norm", lambda self, weight: sound(self, weight) * 1.0001)
    result = run("verify", *tiny, code=1)
    table = rows(result.stdout)
    assert {name for name, row in table.items() if row[-1] == "BROKEN"} == {"gate_proj scores", "up_proj scores"}
    assert table["gate_proj scores"][0] == "5.0e-05"
    assert result.stdout.splitlines()[-1] == "verdict: BROKEN in layer " + ", ".join(map(str, range(LAYERS)))
    assert "Error" not in result.stderr
    answer = json.loads(run("verify", *tiny, "--json", code=1).stdout)
    assert not answer["holds"]
    assert not answer["layers"][0]["checks"]["gate_proj scores"]["holds"]


def test_half_precision_says_its_cost(run: Run, tiny: list[object]) -> None:
    arguments = ["verify", *tiny, "--dtype", "bfloat16", "--layers", 1]
    shown = run(*arguments).stdout
    assert "Difference between bfloat16 and float32" in shown
    answer = json.loads(run(*arguments, "--json").stdout)
    share = answer["cost"][0]["changed"]["up_proj mask"]
    assert rows(shown.split("Difference between")[1])["up_proj mask"] == [f"{share:.2%}", f"{share:.2%}", "0"]


def test_every_flag_reaches_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run_verify(model: str, **options: Any) -> VerifyResult:
        seen.update(model=model, **options)
        return VerifyResult("m", "cpu", "float32", "d", 1, 2, 0, holds=True, layers=(), cost=(), versions={})

    monkeypatch.setattr(neuronrank_torch.runs.verify.run, "run_verify", run_verify)
    defaults = {"dataset": "builtin", "nsamples": 4, "seqlen": 128, "layers": None, "batch_size": 1, "seed": 0}
    defaults |= {"model": "m", "device": "auto", "dtype": "auto"}
    run("verify", "--model", "m", "--json")
    assert callable(seen.pop("progress"))
    assert seen == defaults
    others = {"dataset": "d", "nsamples": 5, "seqlen": 9, "layers": 2, "batch_size": 3, "seed": 7}
    others |= {"model": "o", "device": "cuda", "dtype": "float16"}
    assert {*others, "as_json", "config"} == {p.name for p in verify.params}
    run("verify", *(x for name, value in others.items() for x in ("--" + name.replace("_", "-"), value)), "--json")
    assert callable(seen.pop("progress"))
    assert seen == others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layers 0", "'--layers'"),
        ("--seqlen 100000", "the text has"),
        ("--dataset gone.txt", "file not found: gone.txt"),
        ("--device nonsense", "device nonsense is not available"),
    ],
)
def test_wrong_input(run: Run, tiny: list[object], arguments: str, message: str) -> None:
    assert message in run("verify", *tiny, *arguments.split(), code=2).stderr
