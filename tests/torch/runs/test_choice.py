"""The recipe that does best on held-out calibration text is the one that a run uses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pruning import TEXT, recipe, same_state
from tiny import tiny_model, tiny_tokenizer

from neuronrank_cli.prune_output import print_result
from neuronrank_core import InputError, NonFiniteError, Recipe
from neuronrank_core.effort import candidates, rehearsed
from neuronrank_core.measures import first_within_error
from neuronrank_torch import prune
from neuronrank_torch.evaluation.windows import Evaluated, score_windows
from neuronrank_torch.model.open import load_model, open_model
from neuronrank_torch.runs import choice as choice_module
from neuronrank_torch.runs.choice import Choice, held_out_windows, split_text
from neuronrank_torch.runs.dry_run import plan_prune
from neuronrank_torch.runs.job import Evaluation, Job
from neuronrank_torch.runs.prune import run_prune

CANDIDATES = {
    "good": recipe(method="neuronrank_old", sparsity_ratio=0.95),
    "updated": recipe(sparsity_ratio=0.3, update="gradual"),
    "neurons": recipe(sparsity_type="neurons", sparsity_ratio=0.5),
}


@pytest.fixture(params=["llama", "granite", "gemma3"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tiny_model(request.param, layers=3, hidden=32, intermediate=64, tied=False).save_pretrained(folder)
    tiny_tokenizer(True).save_pretrained(folder)
    return folder


@pytest.fixture
def job(source: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text(TEXT)
    return {"model": str(source), "dataset": str(tmp_path / "text.txt"), "batch_size": 3}


def held_out_nll(source: str, candidate: Recipe) -> list[float]:
    """For each window of the held-out text -log p of a model that is pruned in memory, by a plain forward pass."""
    model, tokenizer, _ = load_model(source)
    calibration, rest = split_text(TEXT)
    prune(model, tokenizer, rehearsed(candidate), calibration, batch_size=3)
    windows = held_out_windows(tokenizer, rehearsed(candidate), rest)
    return [window.nll[0] for window in score_windows([Evaluated(model)], windows)]


def held_out(source: str, candidate: Recipe) -> float:
    """Perplexity of the same."""
    nll = held_out_nll(source, candidate)
    return math.exp(sum(nll) / len(nll) / (candidate.seqlen - 1))


@pytest.mark.parametrize("saving", [False, True])
def test_the_choice_is_that_of_plain_forward_passes(job: dict[str, Any], tmp_path: Path, saving: bool) -> None:
    out = str(tmp_path / "out") if saving else None
    result = run_prune(Job(**job, save=out), CANDIDATES["good"], candidates=CANDIDATES)
    expected = {name: held_out(job["model"], candidate) for name, candidate in CANDIDATES.items()}
    assert result.choice is not None
    assert result.choice.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.choice.chosen == min(expected, key=lambda name: expected[name])


@pytest.mark.parametrize("saving", [False, True])
def test_methods_that_read_no_text_are_compared_too(job: dict[str, Any], tmp_path: Path, saving: bool) -> None:
    compared = {name: recipe(method=name, prune_lm_head=True) for name in ("magnitude", "wanda")}
    out = str(tmp_path / "out") if saving else None
    result = run_prune(Job(**job, save=out), compared["magnitude"], candidates=compared)
    assert result.choice is not None
    expected = {name: held_out(job["model"], candidate) for name, candidate in compared.items()}
    assert result.choice.perplexity == pytest.approx(expected, rel=1e-5)


def test_what_is_lower_by_chance_is_not_chosen(job: dict[str, Any]) -> None:
    ratios = {"good": 0.5, "close": 0.48, "far": 0.1}
    compared = {name: recipe(sparsity_ratio=ratio, nsamples=32) for name, ratio in ratios.items()}
    result = run_prune(Job(**job), compared["good"], candidates=compared)
    nll = {name: np.divide(held_out_nll(job["model"], one), 31) for name, one in compared.items()}
    assert result.choice is not None
    assert result.choice.chosen == first_within_error(nll)


def test_a_lower_perplexity_that_is_not_chosen_is_explained(
    job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    choice = Choice("good", {"good": 30.0, "allocate modules": 29.75, "allocate both": 31.0})
    print_result(replace(run_prune(Job(**job), recipe()), choice=choice))
    others = "allocate modules 29.7500 (not clearly lower), allocate both 31.0000"
    assert f"chose good: held-out perplexity 30.0000; others: {others}" in capsys.readouterr().out


def test_the_run_is_that_of_the_chosen_recipe(job: dict[str, Any], tmp_path: Path) -> None:
    result = run_prune(Job(**job, save=str(tmp_path / "out")), CANDIDATES["good"], candidates=CANDIDATES)
    assert result.choice is not None
    chosen = CANDIDATES[result.choice.chosen]
    assert result.recipe.update == chosen.update
    run_prune(Job(**job, save=str(tmp_path / "direct")), chosen)
    states = [load_model(str(tmp_path / name))[0].state_dict() for name in ("out", "direct")]
    assert same_state(*states)


@pytest.mark.parametrize("saves", [True, False])
def test_the_model_is_opened_once_for_all_candidates_and_the_evaluation(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: bool
) -> None:
    opened: list[str] = []

    def noted(spec: str, **how: Any) -> Any:
        opened.append(spec)
        return open_model(spec, **how)

    monkeypatch.setattr("neuronrank_torch.runs.prune.open_model", noted)
    compared = candidates(recipe(update="gradual"))
    asked = Job(**job, save=str(tmp_path / "out") if saves else None, evaluation=Evaluation(job["dataset"], 32, 4))
    result = run_prune(asked, compared["good"], candidates=compared)
    assert opened == [job["model"]]
    assert result.perplexity is not None


def test_the_estimate_of_memory_counts_the_embeddings_of_the_candidate(job: dict[str, Any], tmp_path: Path) -> None:
    saved = Job(**job, save=str(tmp_path / "out"))
    alone, beside = (
        plan_prune(saved, CANDIDATES["good"], compared=check).plan for check in (None, lambda tokenizer, text: None)
    )
    assert alone is not None
    assert beside is not None
    assert beside.memory == {**alone.memory, "embeddings": 2 * alone.memory["embeddings"]}


def test_the_pruned_head_counts(job: dict[str, Any]) -> None:
    pair = {name: recipe(sparsity_ratio=0.9, prune_lm_head=name == "head") for name in ("no head", "head")}
    choice = run_prune(Job(**job), pair["no head"], candidates=pair).choice
    assert choice is not None
    assert choice.perplexity == pytest.approx(
        {name: held_out(job["model"], one) for name, one in pair.items()}, rel=1e-5
    )
    assert abs(choice.perplexity["head"] / choice.perplexity["no head"] - 1) > 0.001


@pytest.mark.parametrize("ratio", [0.93, 1.0])
def test_recipes_that_leave_nothing_of_an_mlp_can_be_compared(job: dict[str, Any], ratio: float) -> None:
    """Then no token has an input of ``down_proj``."""
    compared = candidates(recipe(update="gradual", sparsity_ratio=ratio))
    result = run_prune(Job(**job), compared["good"], candidates=compared)
    assert result.choice is not None
    assert result.choice.perplexity.keys() == compared.keys()
    wanted = sum(module.size for layer in result.layers for module in layer.modules.values())
    assert result.total.zeros == pytest.approx(ratio * wanted, rel=0.01)


def test_a_candidate_that_ends_in_nan_is_left_out(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = candidates(recipe(update="gradual"))

    def failing(*names: str) -> None:
        def prune_or_fail(model: Any, tokenizer: Any, one: Recipe, *rest: Any, **how: Any) -> Any:
            if one in [rehearsed(compared[name]) for name in names]:
                raise NonFiniteError("NaN in the inputs")
            return prune(model, tokenizer, one, *rest, **how)

        monkeypatch.setattr(choice_module, "prune", prune_or_fail)

    failing("allocate both")
    result = run_prune(Job(**job), compared["good"], candidates=compared)
    assert result.choice is not None
    assert list(result.choice.perplexity) == ["good", "allocate modules"]
    assert result.choice.left_out == {"allocate both": "NaN in the inputs"}
    print_result(result)
    assert "left out: allocate both: NaN in the inputs" in capsys.readouterr().out
    failing("good")
    with pytest.raises(NonFiniteError, match="NaN in the inputs"):
        run_prune(Job(**job), compared["good"], candidates=compared)


def test_an_interrupted_comparison_resumes(job: dict[str, Any], tmp_path: Path) -> None:
    seen: list[str] = []

    def stop(stage: str, *_: object) -> None:
        seen.append(stage)
        if stage.startswith("candidate 3") and len(seen) < 1000:
            seen.extend([""] * 1000)
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"candidates": CANDIDATES}
    with pytest.raises(KeyboardInterrupt):
        run_prune(Job(**job, save=str(tmp_path / "out")), CANDIDATES["good"], stop, **arguments)
    seen.clear()
    again = run_prune(
        Job(**job, save=str(tmp_path / "out")), CANDIDATES["good"], lambda s, *_: seen.append(s), **arguments
    )
    assert {stage.split(":")[0] for stage in seen if stage.startswith("candidate")} == {"candidate 3 of 3"}
    whole = run_prune(Job(**job, save=str(tmp_path / "whole")), CANDIDATES["good"], **arguments)
    assert again.choice is not None
    assert whole.choice is not None
    assert again.choice.perplexity == whole.choice.perplexity
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]


def test_other_candidates_are_another_run(job: dict[str, Any], tmp_path: Path) -> None:
    def stop(stage: str, *_: object) -> None:
        if stage.startswith("candidate 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_prune(Job(**job, save=str(tmp_path / "out")), CANDIDATES["good"], stop, candidates=CANDIDATES)
    with pytest.raises(InputError, match="an unfinished run for this output differs"):
        run_prune(Job(**job, save=str(tmp_path / "out")), CANDIDATES["good"])


@pytest.mark.parametrize("text", [TEXT, "one line " * 500, "short\n" + "word " * 400])
def test_the_parts_of_a_text_are_far_apart(text: str) -> None:
    calibration, rest = split_text(text)
    assert text.startswith(calibration)
    assert text.endswith(rest)
    assert 0.02 * len(text) < len(text) - len(calibration) - len(rest) < 0.08 * len(text)
    assert 0.15 * len(text) < len(rest) < 0.25 * len(text)


def test_a_text_without_room_for_a_window_is_refused(job: dict[str, Any], tmp_path: Path) -> None:
    Path(job["dataset"]).write_text("word " * 30)
    with pytest.raises(InputError, match="holds out the last 20% of the calibration text: the text has"):
        run_prune(Job(**job, save=str(tmp_path / "out")), CANDIDATES["good"], candidates=CANDIDATES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]
