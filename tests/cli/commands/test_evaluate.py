"""A model beside a reference: the figures of its predictions, what is printed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import Run
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def pair(run: Run, small: list[object], model: Path, text: Path) -> list[object]:
    """Flags that compare a pruned model with its original."""
    run("prune", *small, "--prune_method", "wanda", "--save", "pruned")
    return ["--model", "pruned", "--reference", model, "--dataset", text, "--seqlen", 32, "--windows", 5]


def evaluated(run: Run, *flags: object) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(run("eval", *flags, "--json").stdout)
    return content


def test_the_reference_changes_no_perplexity(run: Run, pair: list[object], model: Path) -> None:
    result, alone = evaluated(run, *pair), evaluated(run, *pair[:2], *pair[4:])
    beside = result.pop("reference")
    assert alone.pop("reference") is None
    assert result == alone
    dense = evaluated(run, "--model", model, *pair[4:])
    assert beside["model"] == str(model)
    assert beside["perplexity"] == {name: dense[name] for name in beside["perplexity"]}
    assert 0 < beside["kl_mean"] < beside["kl_p99"]
    assert 0 < beside["agreement"] < 1


def test_what_is_printed_is_what_was_measured(run: Run, pair: list[object], text: Path) -> None:
    result = evaluated(run, *pair)
    beside = result["reference"]
    shown = run("eval", *pair)
    assert shown.stdout.splitlines() == [
        f"perplexity: {result['perplexity']:.4f} (standard error {result['standard_error']:.4f})",
        f"perplexity of the reference: {beside['perplexity']['perplexity']:.4f} "
        f"(standard error {beside['perplexity']['standard_error']:.4f})",
        f"KL divergence from the reference, nats per token: mean {beside['kl_mean']:.4g}, "
        f"99th percentile {beside['kl_p99']:.4g}",
        f"same most likely token: {beside['agreement']:.2%}",
        f"measured on: {text}, 5 windows of 32 tokens, BOS at every window",
    ]
    assert "perplexity of pruned: layer 1 of 4" in shown.stderr


def test_a_model_beside_itself(run: Run, pair: list[object]) -> None:
    beside = evaluated(run, *pair, "--reference", "pruned")["reference"]
    assert (beside["kl_mean"], beside["kl_p99"], beside["agreement"]) == (0.0, 0.0, 1.0)


def test_one_window_has_no_standard_error(run: Run, pair: list[object]) -> None:
    assert evaluated(run, *pair, "--windows", 1)["standard_error"] is None
    assert "standard error" not in run("eval", *pair, "--windows", 1).stdout


def test_references_that_cannot_be_used(run: Run, pair: list[object], tmp_path: Path) -> None:
    tiny_model(layers=2, hidden=32, intermediate=64).save_pretrained(tmp_path / "other")
    tiny_tokenizer(False).save_pretrained(tmp_path / "other")
    refused = run("eval", *pair, "--reference", "other", code=2)
    assert "Error: the predictions of the two models cannot be compared: their tokenizers split" in refused.stderr
    assert refused.stdout == ""
    assert "Error: model not found: nowhere.gguf" in run("eval", *pair, "--reference", "nowhere.gguf", code=2).stderr
    compared = run("compare", *pair[1:4:2], "--eval", "--eval-dataset", pair[5], *pair[6:8], "--json")
    assert 0 < json.loads(compared.stdout)["divergence"]["agreement"] < 1
    apart = run("compare", "other", "pruned", "--eval", "--eval-dataset", pair[5], *pair[6:8], "--json")
    assert "Warning: the predictions of the two models cannot be compared: their tokenizers" in apart.stderr
    found = json.loads(apart.stdout)
    assert found["divergence"] is None
    assert all(figures["perplexity"]["perplexity"] > 1 for figures in found["models"])


def test_compare_takes_the_first_model_as_the_reference(run: Run, pair: list[object], model: Path) -> None:
    beside = evaluated(run, *pair)["reference"]
    flags = ["--eval", "--eval-dataset", pair[5], "--eval-windows", 5, *pair[6:8]]
    found = json.loads(run("compare", model, "pruned", *flags, "--json").stdout)["divergence"]
    for name in ("kl_mean", "kl_p99", "agreement"):
        assert found[name] == beside[name]
    back = json.loads(run("compare", "pruned", model, *flags, "--json").stdout)["divergence"]
    assert back["agreement"] == found["agreement"]
    assert back["kl_mean"] != found["kl_mean"]
    shown = run("compare", model, "pruned", *flags).stdout
    assert f"KL divergence of B from A, nats per token: mean {found['kl_mean']:.4g}" in shown
    assert f"same most likely token: {found['agreement']:.2%}" in shown
