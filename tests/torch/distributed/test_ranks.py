"""Several processes give the same rows, masks, weights and perplexity as one, on every rank."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import together
from pruning import TEXT, pruned, recipe, small, state
from tiny import tiny_tokenizer

from neuronrank_core import AllZeroMetricError, InputError, InvalidValueError, LayerStatistics, NeuronRankError
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.distributed.process_group import exit_code, launched, portable
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.evaluation.perplexity import evaluate

pytestmark = pytest.mark.xdist_group("ranks")
RANKS = 3
#: Recipes by name, each with the sequences of a micro-batch; there are six sequences.
RECIPES: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({}, 1),
    "topics, and a rank without text": ({"method": "neuronrank_tfidf", "tfidf_mode": "topic"}, 4),
    "allocation, attention and head": ({"allocate": "neuronrank", "include_attention": True, "prune_lm_head": True}, 2),
    "dense propagation": ({"propagate": "dense", "method": "wanda"}, 2),
    "no text": ({"method": "magnitude"}, 1),
    "neurons": ({"sparsity_type": "neurons", "sparsity_ratio": 0.25}, 1),
    "heads": ({"sparsity_type": "heads"}, 1),
    "heads with update": ({"sparsity_type": "heads", "update": "least-squares"}, 1),
    "update": ({"update": "least-squares"}, 1),
    "gradual update": ({"update": "gradual"}, 1),
    "update toward the model, and a rank without text": ({"update": "least-squares", "update_target": "model"}, 4),
    "update toward the model behind a norm": ({"update": "least-squares", "update_target": "model"}, 1),
    "update, dense propagation, and a rank without text": ({"update": "least-squares", "propagate": "dense"}, 4),
    "neurons with update": ({"sparsity_type": "neurons", "sparsity_ratio": 0.25, "update": "least-squares"}, 1),
    "experts": ({"method": "neuronrank_tfidf", "tfidf_mode": "doc"}, 1),
    "experts, and a rank without text": ({}, 4),
}


def model_of(name: str) -> Any:
    """The model that a recipe is tried on."""
    if "norm" in name:
        return small("gemma3", layers=2, tied=False)
    return small("qwen3_moe", layers=2) if "experts" in name else small(tied=False)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 8))
def test_shares_are_whole_micro_batches_of_all_items_in_order(count: int, batch_size: int, size: int) -> None:
    ranks = Ranks()
    ranks.size = size
    shares = []
    for ranks.rank in range(size):
        shares.append(range(count)[ranks.share(count, batch_size)])
    assert [item for share in shares for item in share] == list(range(count))
    batches = [-(-len(share) // batch_size) for share in shares]
    assert max(batches) - min(batches) <= 1
    assert batches[0] == max(batches)
    assert all(share.start % batch_size == 0 for share in shares if share)


def test_layers_are_not_removed_by_several() -> None:
    ranks = Ranks()
    ranks.size = 2
    with pytest.raises(InputError, match="--sparsity_type layers runs in a single process"):
        pruned(small(), recipe(sparsity_type="layers"), ranks=ranks)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (NeuronRankError("message", hint="hint"), NeuronRankError, 1),
        (InvalidValueError("field", 3, "less"), NeuronRankError, 2),
        (AllZeroMetricError("layer 2"), NeuronRankError, 1),
        (OSError(28, "No space left on device"), OSError, 1),
        (KeyboardInterrupt(), KeyboardInterrupt, 130),
        (SystemExit(143), SystemExit, 143),
    ],
)
def test_errors_travel(error: BaseException, kind: type[BaseException], code: int) -> None:
    back = pickle.loads(portable(error))
    assert isinstance(back, kind)
    assert (str(back), getattr(back, "hint", "")) == (str(error), getattr(error, "hint", ""))
    assert exit_code(back) == code


def everything(ranks: Ranks) -> dict[str, Any]:
    """Weights and tables of every recipe, and the perplexities of the model before."""
    model = model_of("")
    result: dict[str, Any] = {
        "perplexity": [
            evaluate(model, tiny_tokenizer(), TEXT, seqlen=16, windows=7, batch_size=size, ranks=ranks).nll
            for size in (1, 3, 8)
        ]
    }
    collected = LayerCollector.statistics
    for name, (chosen, batch_size) in RECIPES.items():
        tables: list[LayerStatistics] = []

        def kept(
            self: LayerCollector, *arguments: Any, into: list[LayerStatistics] = tables
        ) -> list[LayerStatistics | None]:
            found = collected(self, *arguments)
            into += [table for table in found if table is not None]
            return found

        model = model_of(name)
        with patch.object(LayerCollector, "statistics", kept):
            report = pruned(model, recipe(**chosen), batch_size=batch_size, ranks=ranks)
        rows = [{key: torch.as_tensor(column) for key, column in table.columns().items()} for table in tables]
        result[name] = {"state": state(model), "rows": rows, "notes": report.notes}
    return result


def member(folder: Path) -> None:
    with launched() as ranks:
        torch.save(everything(ranks), folder / f"{ranks.rank}.pt")
        mine = magnitudes(ranks.rank)
        torch.save(ranks.sum_in_order(mine), folder / f"sum-{ranks.rank}.pt")
        ranks.agree("a weight", [torch.ones(3, dtype=torch.bfloat16)])
        with pytest.raises(NeuronRankError, match="layer 7 differs between rank 0 and rank 2"):
            ranks.agree("layer 7", [torch.tensor([1.0, ranks.rank // 2])])


def magnitudes(seed: int) -> torch.Tensor:
    """A matrix whose sum with others depends on the order in float32; no multiple of the ranks has its rows."""
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """What one process makes of the recipes, and what each of several does."""
    folder = tmp_path_factory.mktemp("ranks")
    for ended in together(RANKS, folder, member, folder):
        assert ended.code == 0, ended.stderr
    return everything(ALONE), [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)], folder


@pytest.mark.parametrize("name", RECIPES)
def test_every_rank_prunes_as_one_process_does(results: Any, name: str) -> None:
    alone, ranks, _ = results
    expected, exact = alone[name], "update" not in name
    first = ranks[0][name]
    smaller = "neurons" in name or "heads" in name
    assert smaller or any(bool((w == 0).any()) for key, w in expected["state"].items() if "mlp" in key)
    assert len(first["rows"]) == len(expected["rows"])
    for table, wanted in zip(first["rows"], expected["rows"], strict=True):
        assert table.keys() == wanted.keys()
        for column in table:
            assert torch.equal(table[column], wanted[column]) or (not exact and table is not first["rows"][0])
    for key, weight in first["state"].items():
        wanted = expected["state"][key]
        assert torch.equal(weight == 0, wanted == 0)
        assert torch.equal(weight, wanted) if exact else torch.allclose(weight, wanted, rtol=1e-3, atol=1e-4)
        # Whatever the ranks add up, it is the same bits for all.
        assert all(torch.equal(weight, rank[name]["state"][key]) for rank in ranks)
    idle = ("1 of 3 processes had no text: lower --batch-size or raise --nsamples",)
    if "heads" in name:
        assert first["notes"] == expected["notes"]
        assert len(first["notes"]) == 1
    else:
        assert (first["notes"], expected["notes"]) == (idle if "without text" in name else (), ())


def test_perplexity_is_that_of_one_process(results: Any) -> None:
    alone, ranks, _ = results
    assert all(rank["perplexity"] == alone["perplexity"] for rank in ranks)


def test_matrices_are_added_in_rank_order(results: Any) -> None:
    one, two, three = map(magnitudes, range(RANKS))
    expected = (one + two) + three
    assert not any(torch.equal(expected, other) for other in ((three + two) + one, (one + three) + two))
    for rank in range(RANKS):
        assert torch.equal(torch.load(results[2] / f"sum-{rank}.pt"), expected)
