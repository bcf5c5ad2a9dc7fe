"""A target size or loss: what is compared, what is chosen, and the model that comes of it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import TEXT, recipe
from tiny import BOS, tiny_model, tiny_tokenizer
from tiny_files import write_model
from tokenizers import Regex, normalizers
from transformers import AutoModelForCausalLM

import neuronrank_torch.model.limits
import neuronrank_torch.runs.collapse
from neuronrank_core import InputError, NonFiniteError, Recipe
from neuronrank_core.errors import UnreachableError
from neuronrank_core.mixes import COMPARED_AT, SHARES, SLACK, Target, described, mixes
from neuronrank_torch import prune
from neuronrank_torch.evaluation.perplexity import perplexity
from neuronrank_torch.model.open import load_model, open_model
from neuronrank_torch.pruning.passes import planned_passes, prune_in_passes, sizes_of
from neuronrank_torch.pruning.whole_layers import LayerRemoval
from neuronrank_torch.runs.choice import held_out_windows, split_text
from neuronrank_torch.runs.job import Evaluation, Job
from neuronrank_torch.runs.page.weights import saved_zeros
from neuronrank_torch.runs.plan_smaller import plan_smaller
from neuronrank_torch.runs.prune import run_prune
from neuronrank_torch.runs.prune_result import PruneResult

HOW = recipe(sparsity_type="neurons", update="least-squares", nsamples=32)


@pytest.fixture
def job(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A job on a model whose layers can be folded into the ones before, unless a test asks for another."""
    family = getattr(request, "param", "llama")
    write_model(tmp_path / "source", tiny_model(family, layers=5, hidden=32, intermediate=96))
    (tmp_path / "text.txt").write_text(TEXT)
    return {"model": str(tmp_path / "source"), "dataset": str(tmp_path / "text.txt"), "batch_size": 4}


#: Tests of what depends on biases, multipliers and on whether layers can be folded.
both_families = pytest.mark.parametrize("job", ["llama", "granite"], indirect=True)


def outside(model: Any) -> int:
    """Parameters without the table of embeddings, which these models also use as their head."""
    return sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)


def by_hand(source: str, passes: dict[str, float]) -> Any:
    """A model pruned by one call after another on the part of the text that is not held out."""
    model, tokenizer, _ = load_model(source)
    for kind, ratio in passes.items():
        one = Recipe(**{**vars(HOW), "sparsity_type": kind, "sparsity_ratio": ratio, "nsamples": 8})
        prune(model, tokenizer, one, split_text(TEXT)[0], batch_size=4)
    return model


def held_out(model: Any) -> float:
    few = Recipe(**{**vars(HOW), "nsamples": 8})
    return perplexity(model, held_out_windows(tiny_tokenizer(True), few, split_text(TEXT)[1])).perplexity


@both_families
def test_a_target_size_is_reached_by_what_costs_least(job: dict[str, Any], tmp_path: Path) -> None:
    result = run_prune(Job(**job, save=str(tmp_path / "out")), HOW, target=Target(target_params=0.8))
    choice = result.choice
    assert choice is not None
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    dense = load_model(job["model"])[0]
    assert (choice.kept, choice.parameters) == (outside(saved), outside(dense))
    assert 0.78 <= choice.kept / choice.parameters <= 0.8
    assert saved.config.intermediate_size % choice.multiple_of == 0
    assert len(choice.perplexity) == 4
    assert choice.chosen == min(choice.perplexity, key=lambda name: choice.perplexity[name])
    assert choice.dense == pytest.approx(held_out(dense), rel=1e-5)
    assert choice.perplexity[choice.chosen] == pytest.approx(held_out(by_hand(job["model"], choice.passes)), rel=1e-4)
    assert result.total.parameters == sum(p.numel() for p in saved.parameters())
    assert sum(p.numel() for p in dense.parameters()) - result.total.parameters == choice.parameters - choice.kept


@both_families
def test_layers_keep_the_numbers_of_the_original_model(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuronrank_torch.runs.smaller.Comparison.measure", lambda self, mix: float(len(mix) == 1))
    cheap = load_model(job["model"])[0]
    with torch.no_grad():  # So that it is not the last layer that goes.
        cheap.model.layers[1].self_attn.o_proj.weight.mul_(0.01)
        cheap.model.layers[1].mlp.down_proj.weight.mul_(0.01)
    cheap.save_pretrained(job["model"])
    how = Recipe(**{**vars(HOW), "multiple_of": 64, "divisible_by": 64})
    result = run_prune(Job(**job, save=str(tmp_path / "out")), how, target=Target(target_params=0.61))
    assert result.choice is not None
    assert list(result.choice.passes) == ["layers-by-influence", "neurons"]
    assert set(result.choice.left_out) == {"query-heads", "key-value-groups"}
    gone = 1
    assert result.removed_layers == [gone]
    assert [layer.layer for layer in result.layers] == [0, 1, 2, 3, 4]
    assert f"layers removed, in this order, and the KL divergence on held-out text then: {gone} (" in result.notes[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (saved.config.num_hidden_layers, saved.config.intermediate_size) == (4, 64)
    dense = load_model(job["model"])[0]
    for layer in result.layers:
        own = dense.model.layers[layer.layer]
        mlp = {name: getattr(own.mlp, name).weight.numel() for name in ("gate_proj", "up_proj", "down_proj")}
        whole = {"layer": sum(p.numel() for p in own.parameters())}
        assert {name: module.size for name, module in layer.modules.items()} == (whole if layer.removed else mlp)
        assert layer.sum("removed") == (whole["layer"] if layer.removed else sum(mlp.values()) // 3)
    kept = [index for index in range(5) if index != gone]
    for index, layer in zip(kept, saved.model.layers, strict=True):
        assert torch.equal(layer.self_attn.q_proj.weight, dense.model.layers[index].self_attn.q_proj.weight)


class Stopped:
    """A run that is interrupted at a stage, and then repeated with what it measures counted."""

    def __init__(self, job: Job, how: Recipe, target: Target | None, at: tuple[str, int]) -> None:
        self.arguments: dict[str, Any] = {"target": target}
        self.job, self.how = job, how
        with pytest.raises(KeyboardInterrupt) as stopped:
            run_prune(job, how, partial(self._stop, at), **self.arguments)
        self.note = " ".join(stopped.value.__notes__)
        self.stages: list[str] = []

    def _stop(self, at: tuple[str, int], stage: str, done: int, *_: object) -> None:
        if stage.startswith(at[0]) and done >= at[1]:
            raise KeyboardInterrupt

    def again(self, monkeypatch: pytest.MonkeyPatch) -> tuple[PruneResult, dict[str, int]]:
        costs = {"kl": LayerRemoval._divergence, "perplexity": neuronrank_torch.runs.smaller.perplexity}
        counted = dict.fromkeys(costs, 0)

        def counting(name: str) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                counted[name] += 1
                return costs[name](*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(LayerRemoval, "_divergence", counting("kl"))
            patch.setattr(neuronrank_torch.runs.smaller, "perplexity", counting("perplexity"))
            result = run_prune(self.job, self.how, lambda stage, *_: self.stages.append(stage), **self.arguments)
        return result, counted


LAYERS = replace(HOW, sparsity_type="layers", sparsity_ratio=0.4)


@pytest.mark.parametrize("target", [Target(target_params=0.8), Target(max_loss=3.0)])
def test_an_interrupted_choice_measures_what_is_missing(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    whole = run_prune(Job(**job, save=str(tmp_path / "whole")), HOW, target=target)
    stopped = Stopped(Job(**job, save=str(tmp_path / "out")), HOW, target, ("candidate 3: calibrating layer 2 of 5", 4))
    assert stopped.note == "measurements of candidates are saved (2): rerun the same command to resume"
    again, counted = stopped.again(monkeypatch)
    assert "resuming: measurements of candidates are kept (2)" in stopped.stages
    assert whole.choice is not None
    assert again.choice is not None
    assert again.choice.perplexity == whole.choice.perplexity
    assert again.choice.dense == whole.choice.dense
    assert counted["perplexity"] == len(whole.choice.perplexity) - 2
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt", "out", "whole"}


@pytest.mark.parametrize(("at", "measured"), [(("removing layer 2 of 2", 2), 7), (("saving", 0), 9)])
@both_families
def test_an_interrupted_removal_of_layers_measures_what_is_missing(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: tuple[str, int], measured: int
) -> None:
    whole = run_prune(Job(**job, save=str(tmp_path / "whole")), LAYERS)
    stopped = Stopped(Job(**job, save=str(tmp_path / "out")), LAYERS, None, at)
    assert stopped.note == f"measurements of candidates are saved ({measured}): rerun the same command to resume"
    again, counted = stopped.again(monkeypatch)
    assert counted["kl"] == 9 - measured  # 5 layers, then the 4 that are left.
    assert again.notes == whole.notes
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]


def test_what_is_measured_once_leaves_nothing_behind(job: dict[str, Any], tmp_path: Path) -> None:
    def stop(stage: str, *_: object) -> None:
        if stage.startswith("saving"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_prune(Job(**job, save=str(tmp_path / "out")), replace(LAYERS, sparsity_type="layers-by-influence"), stop)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt"}


def test_another_target_is_another_run(job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Stopped(Job(**job, save=str(tmp_path / "out")), HOW, Target(target_params=0.8), ("candidate 3", 0))
    with pytest.raises(InputError, match=r"differs from this one: target target_params was 0\.8, is 0\.7"):
        run_prune(stopped.job, HOW, target=Target(target_params=0.7))
    stopped.job = replace(stopped.job, force=True)
    stopped.arguments = {"target": Target(target_params=0.7)}
    again, counted = stopped.again(monkeypatch)
    assert again.choice is not None
    assert counted["perplexity"] == len(again.choice.perplexity) + 1


@pytest.mark.parametrize("dataset", ["", "self"])
def test_what_cannot_be_reached_leaves_nothing_behind(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    costs = iter(range(1, 1000))
    measured: list[Any] = []

    def dearer(*arguments: Any, **options: Any) -> Any:
        measured.append(perplexity(*arguments, **options))
        return replace(measured[-1], perplexity=float(next(costs)))

    monkeypatch.setattr(neuronrank_torch.runs.smaller, "perplexity", dearer)
    how = replace(HOW, nsamples=4, seqlen=16) if dataset else HOW
    where = {**job, "dataset": dataset or job["dataset"]}
    with pytest.raises(UnreachableError, match="keeps to --max-loss"):
        run_prune(Job(**where, save=str(tmp_path / "out")), how, target=Target(max_loss=0.0))
    assert len(measured) > 2
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt"}


def test_lack_of_memory_does_not_discard_what_was_measured(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Stopped(Job(**job, save=str(tmp_path / "out")), HOW, Target(target_params=0.8), ("candidate 3", 0))

    def full(*_: object) -> None:
        raise InputError("a copy of the model needs more memory")

    with monkeypatch.context() as patch:
        patch.setattr(neuronrank_torch.runs.smaller, "check_memory", full)
        with pytest.raises(InputError, match="more memory"):
            run_prune(stopped.job, HOW, target=Target(target_params=0.8))
    assert (tmp_path / ".out.partial").exists()
    again, counted = stopped.again(monkeypatch)
    assert again.choice is not None
    assert counted["perplexity"] == len(again.choice.perplexity) - 2


def test_a_layer_without_which_the_model_overflows_is_an_error(job: dict[str, Any]) -> None:
    model = load_model(job["model"])[0]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or Inf in the predictions without layer 0"):
        prune(model, tiny_tokenizer(True), LAYERS, TEXT, batch_size=4)


def test_the_smallest_model_within_a_loss(job: dict[str, Any]) -> None:
    loose, tight = (run_prune(Job(**job), HOW, target=Target(max_loss=loss)).choice for loss in (3.0, 0.05))
    assert loose is not None
    assert tight is not None
    assert loose.kept <= tight.kept
    for choice, loss in ((loose, 3.0), (tight, 0.05)):
        assert choice.dense is not None
        assert choice.perplexity[choice.chosen] <= (1 + loss) * choice.dense
        # What is 5 points smaller was measured, and costs more; or there was nothing smaller to try.
        shares = {name: value / choice.dense - 1 for name, value in choice.perplexity.items()}
        assert max(shares.values()) > loss or choice.kept <= 0.32 * choice.parameters


def test_a_loss_that_no_size_keeps_to_is_refused(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuronrank_torch.runs.smaller.Comparison.measure", lambda self, mix: 2 * self.dense)
    with pytest.raises(InputError, match=r"no model with at most 95% .* keeps to --max-loss 0.1: the loss is 1 "):
        run_prune(Job(**job), HOW, target=Target(max_loss=0.1))


def test_a_target_that_nothing_reaches_is_refused_before_work(job: dict[str, Any], tmp_path: Path) -> None:
    how = Recipe(**{**vars(HOW), "multiple_of": 48})
    with pytest.raises(InputError, match=r"nothing that can be removed leaves 93% to 95% of the parameters"):
        run_prune(Job(**job, save=str(tmp_path / "out")), how, target=Target(target_params=0.95))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("multiple_of", [24, 48])
def test_sizes_that_nothing_reaches_are_left_out(job: dict[str, Any], multiple_of: int) -> None:
    how = Recipe(**{**vars(HOW), "multiple_of": multiple_of})
    sizes = sizes_of(load_model(job["model"])[0], how)[0]
    reached = [share for share in SHARES if mixes(sizes, share, how)]
    assert 0 < len(reached) < len(SHARES)
    choice = run_prune(Job(**job), how, target=Target(max_loss=3.0)).choice
    assert choice is not None
    assert choice.dense is not None
    assert choice.perplexity[choice.chosen] <= 4 * choice.dense
    nearest = min(reached, key=lambda share: abs(share - COMPARED_AT))
    assert {described(mix) for mix in mixes(sizes, nearest, how).values()} <= choice.perplexity.keys()
    assert any(share - SLACK <= choice.kept / choice.parameters <= share for share in reached)


def test_a_model_of_which_nothing_can_be_removed_is_refused_before_work(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuronrank_torch.runs.smaller.mixes", lambda *_: {})
    monkeypatch.setattr("neuronrank_torch.runs.smaller.Comparison.__init__", None)
    with pytest.raises(InputError, match="nothing that can be removed leaves") as refused:
        run_prune(Job(**job), HOW, target=Target(max_loss=0.1))
    assert refused.value.hint.startswith("choose another --max-loss, or")


@pytest.mark.parametrize(
    ("target", "multiple_of"),
    [(Target(target_params=0.67), None), (Target(target_params=0.8), 6), (Target(max_loss=0.5), 1)],
)
def test_every_expert_of_a_mixture_loses_neurons(tmp_path: Path, target: Target, multiple_of: int | None) -> None:
    """By widths with which they can run."""
    write_model(tmp_path / "moe", tiny_model("mixtral", layers=3, hidden=32, intermediate=48))
    (tmp_path / "text.txt").write_text(TEXT)
    how = {"model": str(tmp_path / "moe"), "dataset": str(tmp_path / "text.txt")}
    choice = run_prune(Job(**how), replace(HOW, multiple_of=multiple_of), target=target).choice
    assert choice is not None
    assert "neurons" not in choice.left_out
    assert not any("cannot run" in reason for reason in choice.left_out.values())
    gone = [int(found[1]) for mix in choice.perplexity if (found := re.search(r"(\d+) of 48 neurons", mix))]
    assert gone
    assert all((48 - number) % math.lcm(4, multiple_of or 1) == 0 for number in gone)


def test_sizes_that_end_in_nan_are_not_within_a_loss(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = neuronrank_torch.runs.smaller
    measure, least = smaller.Comparison.measure, 0.75

    def failing(self: Any, mix: Any) -> float:
        if smaller.left(self.candidates.sizes, mix) < least * self.candidates.sizes.parameters:
            raise NonFiniteError("NaN or Inf in the predictions")
        return measure(self, mix)

    monkeypatch.setattr(smaller.Comparison, "measure", failing)
    choice = run_prune(Job(**job), HOW, target=Target(max_loss=100.0)).choice
    assert choice is not None
    assert choice.kept >= least * choice.parameters
    assert any("NaN" in reason for reason in choice.left_out.values())
    monkeypatch.setattr(smaller.Comparison, "best", lambda self, share: "neurons")
    least = 1.0
    with pytest.raises(UnreachableError, match=r"no model with at most 95% .* --max-loss 100: NaN or Inf in the pred"):
        run_prune(Job(**job), HOW, target=Target(max_loss=100.0))


@pytest.mark.parametrize("target", [Target(target_params=0.8), Target(max_loss=3.0)])
def test_a_candidate_that_ends_in_nan_is_left_out(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    measure = neuronrank_torch.runs.smaller.Comparison.measure

    def failing(self: Any, mix: Any) -> float:
        if "layers-by-influence" in mix:
            raise NonFiniteError("NaN or Inf in the predictions")
        return measure(self, mix)

    monkeypatch.setattr(neuronrank_torch.runs.smaller.Comparison, "measure", failing)
    choice = run_prune(Job(**job), HOW, target=target).choice
    assert choice is not None
    assert any("layers" in mix and "NaN" in reason for mix, reason in choice.left_out.items())
    assert not any("layers" in mix for mix in choice.perplexity)


def test_mlps_of_different_widths_lose_no_neurons() -> None:
    sizes, left_out = sizes_of(tiny_model("qwen3_moe", layers=3, hidden=32, intermediate=48), HOW)
    assert sizes.neurons == 0
    assert left_out["neurons"] == "the layers, or the MLPs in a layer, differ in width"


def test_what_does_not_fit_into_memory_is_refused(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuronrank_torch.model.limits, "get_max_memory", lambda: {"cpu": 1000})
    with pytest.raises(InputError, match=r"the whole model needs 0\.0 GB of memory"):
        run_prune(Job(**job), HOW, target=Target(target_params=0.8))
    with pytest.raises(InputError, match="the whole model needs"):
        run_prune(Job(**job), Recipe(sparsity_type="layers", nsamples=8, seqlen=32))


def rise(dense: Any, pruned: Any, windows: torch.Tensor) -> float:
    """How many times as high the perplexity is, by plain forward passes."""
    with torch.no_grad():
        losses = [model(windows, labels=windows).loss.double() for model in (dense, pruned)]
    return float((losses[1] - losses[0]).exp())


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("kind", ["neurons", "heads", "layers"])
def test_a_model_that_no_longer_predicts_text_is_named(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, saving: bool
) -> None:
    chosen = recipe(sparsity_type=kind, sparsity_ratio=0.5)
    own = {**job, "save": str(tmp_path / "out")} if saving else job
    assert not [note for note in run_prune(Job(**own), chosen).notes if "no longer predicts" in note]
    monkeypatch.setattr(neuronrank_torch.runs.collapse, "COLLAPSED", 0.5)
    [note] = [note for note in run_prune(Job(**own, force=True), chosen).notes if "no longer predicts" in note]
    if saving:
        tokens = torch.as_tensor(tiny_tokenizer(True)(TEXT)["input_ids"])[1:]
        windows = torch.cat([torch.full((4, 1), BOS), tokens[: 4 * 31].view(4, 31)], dim=1)
        expected = rise(load_model(job["model"])[0], load_model(str(tmp_path / "out"))[0], windows)
        assert (
            note
            == f"the model no longer predicts text: its perplexity is {expected:.4g} times that before; remove less"
        )


def test_a_perplexity_that_was_measured_is_not_measured_again(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronrank_torch.runs.collapse, "COLLAPSED", 0.5)
    evaluation = Evaluation(job["dataset"], seqlen=32, windows=3)
    result = run_prune(Job(**job, evaluation=evaluation), recipe(sparsity_type="neurons", sparsity_ratio=0.5))
    assert result.perplexity is not None
    ratio = result.perplexity.after.perplexity / result.perplexity.before.perplexity
    assert f"its perplexity is {ratio:.4g} times" in result.notes[-1]
    unstructured = run_prune(Job(**job, evaluation=evaluation), recipe(sparsity_ratio=0.5))
    assert not [note for note in unstructured.notes if "no longer predicts" in note]


@both_families
def test_the_report_counts_what_every_pass_left(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "neuronrank_torch.runs.smaller.Comparison.measure", lambda self, mix: float("query-heads" not in mix)
    )
    result = run_prune(Job(**job, save=str(tmp_path / "out")), HOW, target=Target(target_params=0.8))
    assert result.choice is not None
    assert list(result.choice.passes) == ["query-heads", "neurons"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for row in saved_zeros(open_model(str(tmp_path / "out"))[0], result):
        layer = saved.model.layers[row["layer"]]
        own = {
            name: m.weight.numel()
            for part in (layer.self_attn, layer.mlp)
            for name, m in part.named_children()
            if hasattr(m, "weight")
        }
        assert {name: module["size"] for name, module in row["modules"].items()} == own
        reported = result.layers[row["layer"]].modules
        assert {name: module.size - module.removed for name, module in reported.items()} == own


@both_families
@pytest.mark.parametrize(
    "kinds", [("query-heads", "neurons"), ("layers-by-influence", "neurons"), ("layers-by-influence", "query-heads")]
)
def test_a_plan_counts_what_every_pass_removes(job: dict[str, Any], kinds: tuple[str, ...]) -> None:
    recipes = [replace(HOW, sparsity_type=kind, sparsity_ratio=0.5 if kind[:4] != "laye" else 0.4) for kind in kinds]
    planned = planned_passes(open_model(job["model"])[0].model, recipes)
    model, tokenizer, _ = load_model(job["model"])
    report = prune_in_passes(model, tokenizer, recipes, TEXT, batch_size=4)
    assert report.total.removed > 0
    for what, total in (("size", "prunable"), ("removed", "removed")):
        assert sum(layer.sum(what) for layer in planned) == getattr(report.total, total)


@both_families
def test_a_plan_for_a_target_names_no_more_than_there_is(job: dict[str, Any]) -> None:
    result = plan_smaller(Job(**job), HOW, Target(target_params=0.24))
    assert result.choice is not None
    assert len(result.choice.passes) == 2
    assert result.total.removed == sum(layer.sum("removed") for layer in result.layers) < result.total.prunable


@both_families
def test_zeros_of_layers_that_stay_are_counted(job: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer, _ = load_model(job["model"])
    prune(model, tokenizer, recipe(method="magnitude", sparsity_ratio=0.5))
    model.save_pretrained(job["model"])
    zeros = [sum(int((p == 0).sum()) for p in layer.parameters()) for layer in model.model.layers]
    result = run_prune(Job(**job, save=str(tmp_path / "out")), LAYERS)
    saved, _, _ = load_model(str(tmp_path / "out"))
    left = iter([sum(int((p == 0).sum()) for p in layer.parameters()) for layer in saved.model.layers])
    left_by_layer = [0 if layer.removed else next(left) for layer in result.layers]
    assert [layer.sum("zeros_before") for layer in result.layers] == zeros
    assert [layer.sum("zeros") for layer in result.layers] == left_by_layer
    counted = saved_zeros(open_model(str(tmp_path / "out"))[0], result)
    assert [layer["modules"]["layer"]["zeros"] for layer in counted] == left_by_layer
    assert sum(left_by_layer) > 0.3 * sum(zeros)


def test_a_text_with_few_tokens_in_its_first_characters(job: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer(True)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.save_pretrained(job["model"])
    Path(job["dataset"]).write_text(" " * 9000 + TEXT)
    result = run_prune(Job(**job), recipe(sparsity_type="neurons", sparsity_ratio=0.25))
    assert result.total.removed
