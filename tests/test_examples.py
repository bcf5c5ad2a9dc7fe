"""The examples run, on fewer seeds; what they print is in docs/understand/beyond-llms.md."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
torch.set_num_threads(1)


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(request.param)


def mean(runs: Sequence[dict[str, list[float]]], name: str) -> np.ndarray:
    return np.mean([run[name] for run in runs], axis=0)


@pytest.mark.parametrize("example", ["digits_mlp"], indirect=True)
def test_mlp(example: ModuleType) -> None:
    for runs in zip(*map(example.accuracies, range(4)), strict=True):
        random, fewest = mean(runs, "random"), example.RATIOS.index(0.3)
        for name in runs[0]:
            assert mean(runs, name)[0] == random[0] > 0.95, name
            assert mean(runs, name)[-1] < 0.7, name
        for name in ("magnitude", "neuronrank_wanda", "neuronrank_wanda + IDF"):
            assert mean(runs, name)[fewest] > random[fewest] + 0.02, name


@pytest.mark.parametrize("example", ["digits_cnn"], indirect=True)
def test_cnn(example: ModuleType) -> None:
    runs = [example.accuracies(seed, epochs=12) for seed in range(4)]
    random, fewest = mean(runs, "random"), example.RATIOS.index(0.3)
    for name in runs[0]:
        assert mean(runs, name)[0] == random[0] > 0.9, name
        assert mean(runs, name)[-1] < 0.9, name
    for name in ("strength", "strength * IDF over class", "variance between class"):
        assert mean(runs, name)[fewest] > random[fewest] + 0.02, name


@pytest.mark.parametrize("example", ["table"], indirect=True)
def test_the_table_says_mean_and_paired_difference(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [{"one": [1.0, 0.5], "other": [1.0, 0.6]}, {"one": [0.8, 0.3], "other": [1.0, 0.8]}]
    example.show("what", (0.0, 0.5), runs, "one")
    assert capsys.readouterr().out.splitlines() == [
        "what, 2 seeds                        0%    50%   50% - one",
        "one                               0.900  0.400   +0.000 ± 0.000",
        # 0.1 and 0.5: mean 0.3, standard deviation 0.2828, over the root of 2.
        "other                             1.000  0.700   +0.300 ± 0.200",
    ]


@pytest.mark.parametrize("name", ["digits_mlp", "digits_cnn"])
def test_it_is_short(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) < 40
