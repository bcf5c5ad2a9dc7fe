"""What is printed where: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import LAYERS, Run
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_files import greedy, write_gguf, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import neuronrank_torch.runs.prune
from neuronrank_cli import console
from neuronrank_cli.console import Stages, decimal, perplexity_text, size_text
from neuronrank_cli.prune_output import _duration
from neuronrank_torch.evaluation.perplexity import Perplexity, evaluate
from neuronrank_torch.text.sources import load_text


def test_the_table(run: Run, small: list[object]) -> None:
    shown = run("prune", *small, "--pruning_last", 2, "--prune_method", "wanda", "--save", "out", "--verbose").stdout
    assert shown.splitlines()[0].endswith(": wanda, 0.5 unstructured")
    rows = re.findall(r"│\s+(\w+) │\s+([\d,]+) │\s+([\d,]+) │ ([\d.]+)% │\s+([\d.]+) │", shown)
    assert [row[:4] for row in rows] == [
        ("2", "6,144", "3,072", "50.0000"),
        ("3", "6,144", "3,072", "50.0000"),
        ("total", "12,288", "6,144", "50.0000"),
    ]


def test_the_verdict(run: Run, small: list[object], measured: list[object], model: Path, tmp_path: Path) -> None:
    result = run("prune", *small, *measured, "--pruning_last", 2, "--prune_method", "wanda", "--save", "out")
    lines = result.stdout.splitlines()
    dense, pruned = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    windows = cut(model, small[3])
    before, after = (window_losses(each, windows) for each in (dense, pruned))
    moved = after - before
    change, error = np.expm1(moved.mean()), np.exp(moved.mean()) * moved.std(ddof=1) / math.sqrt(len(moved))
    kl = divergence_of(dense, pruned, windows)
    parameters = sum(p.numel() for p in dense.parameters())
    size = size_text((model / "model.safetensors").stat().st_size)
    assert lines[1] == "2 layers: 6,144 of 12,288 weights zero, 50.0000% in each"
    assert lines[-5:] == [
        "saved to: out",
        f"weights: 6,144 zero, {6144 / parameters:.2%} of the {parameters:,} parameters of the whole model",
        f"size on disk: {size} safetensors float32 -> {size} safetensors float32",
        f"perplexity: {change:+.2%} (standard error {error:.2%}); KL divergence {kl:.4g} nats per token",
        "faster: no: zeros are computed and stored like other weights; next: neuronrank report out",
    ]
    perplexities = re.findall(r"^perplexity (before|after): +([\d.]+) \(standard", result.stdout, re.MULTILINE)
    assert perplexities == [("before", f"{np.exp(before.mean()):.4f}"), ("after", f"{np.exp(after.mean()):.4f}")]
    where = "2 windows of 32 tokens, BOS at every window"
    assert re.search(rf"^measured on: \S+text.txt, {where}$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("kind", ["heads", "layers"])
def test_the_verdict_of_a_smaller_model(
    kind: str, run: Run, small: list[object], measured: list[object], model: Path, tmp_path: Path
) -> None:
    flags = ["--sparsity_type", kind, "--update", "least-squares", "--nsamples", 10, "--save", "out"]
    shown = run("prune", *small, *measured, *flags)
    dense, pruned = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    windows = cut(model, small[3])
    before, after = (np.exp(window_losses(each, windows).mean()) for each in (dense, pruned))
    perplexities = re.findall(r"^perplexity (before|after): +([\d.]+) \(standard", shown.stdout, re.MULTILINE)
    assert {name: float(value) for name, value in perplexities} == pytest.approx(
        {"before": before, "after": after}, rel=1e-5
    )
    whole, left = (sum(p.numel() for p in each.parameters()) for each in (dense, pruned))
    assert left < whole
    lines = shown.stdout.splitlines()
    assert lines[-4] == (
        f"weights: {whole - left:,} removed, {1 - left / whole:.2%} of the {whole:,} parameters of the whole model"
    )
    old, new = (size_text((folder / "model.safetensors").stat().st_size) for folder in (model, tmp_path / "out"))
    assert lines[-3] == f"size on disk: {old} safetensors float32 -> {new} safetensors float32"
    [kl] = re.findall(r"; KL divergence ([\d.]+) nats per token$", lines[-2])
    assert float(kl) == pytest.approx(divergence_of(dense, pruned, windows), rel=1e-3)
    speed = f"yes: the removed {kind} are neither computed nor stored"
    assert lines[-1].startswith(f"faster: {speed}; next: neuronrank compare ")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"{1 - left / whole:.2%} of its {whole:,} parameters pruned ({whole - left:,} removed)" in card
    assert f"| perplexity after | {perplexities[1][1]} |" in card
    assert ("| `method` |" in card) == ("neuronrank_wanda" in lines[0]) == (kind == "heads")
    assert "input_exp" not in card
    if kind == "layers":
        [gone] = re.findall(
            r"^2 of 4 layers removed \(([\d, ]+)\), with [\d,]+ parameters$", shown.stdout, re.MULTILINE
        )
        [order] = re.findall(r"layers removed, in this order, .*: (\d) \([\d.]+\), (\d) \(", shown.stderr)
        assert gone == ", ".join(sorted(order))
        assert f"Layers removed, as the base model numbers them: {gone}." in card


def cut(model: Path, text: object) -> torch.Tensor:
    """The first two windows of 32 tokens, each after a BOS token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(Path(str(text)).read_text("utf-8"), add_special_tokens=False)["input_ids"]
    return torch.tensor([[tokenizer.bos_token_id, *ids[start : start + 31]] for start in (0, 31)])


def log_probabilities(model: Any, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(windows).logits[:, :-1].double().log_softmax(-1)


def window_losses(model: Any, windows: torch.Tensor) -> Any:
    found = log_probabilities(model, windows).gather(2, windows[:, 1:, None])
    return -found.mean((1, 2)).numpy()


def divergence_of(dense: Any, pruned: Any, windows: torch.Tensor) -> float:
    p, q = (log_probabilities(model, windows) for model in (dense, pruned))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (
            ["--sparsity_type", "neurons", "--sparsity_ratio", 0.3, "--save", "out"],
            [
                "weights: 7,296 removed, ",
                "perplexity: not measured (--eval)",
                "faster: yes: the removed neurons are neither computed nor stored; "
                "next: neuronrank eval --model out --reference ",
            ],
        ),
        (
            ["--sparsity_type", "neurons", "--save", "out", "--eval", "--eval-windows", 1],
            ["faster: yes: the removed neurons are neither computed nor stored; next: neuronrank compare "],
        ),
        (
            ["--sparsity_type", "2:4", "--save", "o t"],
            ["faster: only with kernels for 2:4 sparsity: without, ", "next: neuronrank eval --model 'o t' --ref"],
        ),
        (
            ["--eval", "--eval-windows", 1],
            [
                " -> not saved (--save FOLDER)",
                "perplexity: ",
                "nats per token",
                "next: the same command with --save FOLDER",
            ],
        ),
        (["--sparsity_ratio", 0, "--save", "out"], ["weights: 0 zero, 0.00% of ", "none is new"]),
        (["--dtype", "bfloat16", "--save", "out"], ["safetensors float32 -> ", "safetensors bfloat16\n"]),
        (["--allocate", "neuronrank", "--save", "out"], ["in each (--verbose lists them)"]),
        (["--dry-run", "--sparsity_type", "neurons"], ["weights: 12,288 to remove, "]),
        (["--dry-run", "--sparsity_type", "key-value-groups"], ["weights: 6,144 to remove, "]),
        (["--dry-run"], ["weights: 12,288 to be zero, "]),
    ],
    ids=str,
)
def test_the_verdict_of_other_runs(run: Run, small: list[object], flags: list[object], lines: list[str]) -> None:
    result = run("prune", *small, *flags)
    for line in lines:
        assert line in result.stdout
    unsaved = not {"--save", "--dry-run"}.intersection(flags)
    assert result.stderr.startswith("Warning: without --save, ") == unsaved


def test_the_verdict_counts_removed_biases(run: Run, small: list[object], tmp_path: Path) -> None:
    wide = write_model(tmp_path / "granite", tiny_model("granite", layers=2, hidden=32, intermediate=64))
    lines = run("prune", "--model", wide, *small[2:], "--sparsity_type", "neurons", "--save", "out").stdout.splitlines()
    models = (AutoModelForCausalLM.from_pretrained(folder) for folder in (wide, tmp_path / "out"))
    whole, left = (sum(p.numel() for p in each.parameters()) for each in models)
    assert whole - left == 2 * 32 * (3 * 32 + 2)  # Of 64 neurons in each of two layers; gate and up have biases.
    assert lines[-4].startswith(
        f"weights: {whole - left:,} removed, {1 - left / whole:.2%} of the {whole:,} parameters"
    )


def test_the_verdict_names_earlier_zeros(run: Run, small: list[object], holed: Path) -> None:
    shown = run("prune", "--model", holed, *small[2:], "--save", "out").stdout
    assert re.search(r"^weights: 12,288 zero, .* whole model; 300 of them were zero before$", shown, re.MULTILINE)
    shown = run("prune", *small, "--sparsity_ratio", 0, "--save", "same").stdout
    assert re.search(
        r"^weights: 0 zero, 0.00% of the [\d,]+ parameters of the whole model; none is new$", shown, re.MULTILINE
    )


@pytest.mark.parametrize("update", ["none", "least-squares"])
def test_the_verdict_says_which_zeros_are_left(
    run: Run, small: list[object], model: Path, tmp_path: Path, update: str
) -> None:
    holed = shutil.copytree(model, tmp_path / "holed")
    tensors = load_file(holed / "model.safetensors")
    tensors[f"model.layers.{LAYERS - 1}.mlp.down_proj.weight"][:10, :30] = 0
    save_file(tensors, holed / "model.safetensors", metadata={"format": "pt"})
    flags = ["--sparsity_type", "neurons", "--sparsity_ratio", 0.25, "--update", update]
    shown = run("prune", "--model", holed, *small[2:], *flags, "--save", "out").stdout
    found = re.search(r"^weights: .* removed, .* whole model; (\d+) of the 300 zeros .* left$", shown, re.MULTILINE)
    assert found
    left = sum(int((tensor == 0).sum()) for name, tensor in load_file(tmp_path / "out/model.safetensors").items())
    assert int(found[1]) == left
    assert (left > 0) == (update == "none")


@pytest.mark.parametrize("kind", ["unstructured", "layers"])
def test_samples(kind: str, run: Run, small: list[object], model: Path, tmp_path: Path) -> None:
    flags = ["--sparsity_type", kind, "--save", "out"]
    found = json.loads(run("prune", *small, *flags, "--sample", "--json").stdout)
    prompts = ["The capital of France is", "Water boils when", "Once upon a time, there was a"]
    expected = [[prompt, greedy(model, prompt, 40), greedy(tmp_path / "out", prompt, 40)] for prompt in prompts]
    assert [[one["prompt"], one["before"], one["after"]] for one in found["samples"]] == expected
    assert expected[0][1] != expected[0][2]
    assert json.loads((tmp_path / "out" / "neuronrank.json").read_text("utf-8"))["samples"] == found["samples"]
    assert json.loads(run("prune", *small, "--save", "plain", "--json").stdout)["samples"] == []
    lines = run("prune", *small, *flags[:2], "--sample").stdout.splitlines()  # Without --save, nothing is loaded again.
    at = lines.index("sample: The capital of France is")
    before, after = (" ".join(text.split()) for text in expected[0][1:])
    assert lines[at + 1 : at + 3] == [f"  before: {before}", f"  after:  {after}"]
    assert lines[at + 3] == "sample: Water boils when"
    assert lines[-4].startswith("weights: ")
    shown = run("prune", *small, "--sample", "--dry-run") if kind == "unstructured" else None
    assert shown is None or "--sample has no effect with --dry-run" in shown.stderr


def test_samples_that_do_not_fit_are_refused_before_the_run(run: Run, small: list[object], tmp_path: Path) -> None:
    short = tiny_model(layers=2, hidden=32, intermediate=64)
    short.config.max_position_embeddings = 50
    write_model(tmp_path / "short", short)
    shown = run("prune", "--model", tmp_path / "short", *small[2:], "--sample", "--save", "out", code=2)
    assert "new_tokens is 40, allowed: [0, 25] after a prompt of 25 tokens" in shown.stderr
    assert "calibrating" not in shown.stderr


def test_a_gguf_file_grows_and_says_so(run: Run, small: list[object], tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model(layers=2, hidden=32, intermediate=64))
    arguments = ["--model", tmp_path / "tiny.gguf", *small[2:], "--prune_method", "magnitude"]
    shown = run("prune", *arguments, "--save", "out").stdout
    stored = r"\d+ KiB GGUF F32 -> \d+ KiB safetensors"
    assert re.search(rf"^size on disk: {stored} float32, half with --dtype bfloat16$", shown, re.MULTILINE)
    shown = run("prune", *arguments, "--save", "half", "--dtype", "bfloat16").stdout
    assert re.search(rf"^size on disk: {stored} bfloat16$", shown, re.MULTILINE)


def test_what_is_known_before_the_run_is_said_before(run: Run, small: list[object], measured: list[object]) -> None:
    update = ["--update", "least-squares", "--nsamples", 1, "--nr-include-attention"]
    lines = run("prune", *small, *measured, *update, "--save", "out").stderr.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("calibrating"))
    needed = "Warning: --update least-squares fits the 64 inputs of down_proj on 32 tokens: use --nsamples 2 or more"
    assert [line for line in lines if line.startswith("Warning")] == lines[begin - 2 : begin]
    assert lines[begin - 2].startswith("Warning: the evaluation text is the calibration text")
    assert lines[begin - 1] == needed
    assert "Warning" not in run("prune", *small, *update[:2], "--nsamples", 2, "--save", "two").stderr
    for kind, few, enough, what in (("heads", 1, 2, "inputs of o_proj"), ("layers", 2, 3, "outputs of down_proj")):
        at = [*small, *update[:2], "--sparsity_type", kind, "--seqlen", 24, "--save", kind, "--nsamples"]
        needed = f"Warning: --update least-squares fits the 32 {what} on 24 tokens: use --nsamples {enough} or more"
        assert needed in run("prune", *at, few).stderr
        assert "fits the" not in run("prune", *at, enough, "--force").stderr
    tokens = len(AutoTokenizer.from_pretrained(small[1])(Path(str(small[3])).read_text("utf-8")).input_ids) - 1
    many = ["--nsamples", tokens // 32 + 1, "--prune_method", "wanda"]
    said = f"are drawn from a text of {tokens:,} tokens, so they overlap: --nsamples {tokens // 32} covers it once"
    lines = run("prune", *small, *many, "--save", "many").stderr.splitlines()
    assert said in lines[1]
    assert "Warning" in run("prune", *small, *many, "--dry-run").stderr
    assert "Warning" not in run("prune", *small, "--nsamples", tokens // 32, "--dry-run").stderr


def test_eval_without_save_leaves_nothing(
    run: Run, small: list[object], measured: list[object], tmp_path: Path
) -> None:
    run("prune", *small, *measured)
    assert list(tmp_path.iterdir()) == []


def test_progress_in_a_log_file(
    run: Run, small: list[object], measured: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    layers = [f"layer {layer} of {LAYERS}" for layer in range(1, LAYERS + 1)]
    stderr = run("prune", *small, "--batch-size", 1, *measured, "--save", "out").stderr
    assert stderr.splitlines() == [
        f"loading {small[1]}",
        "Warning: the evaluation text is the calibration text: perplexity after pruning looks better than it is",
        *(f"calibrating {layer}" for layer in layers),
        *(f"perplexity before pruning: {layer}" for layer in layers),
        *(f"perplexity after pruning: {layer}" for layer in layers),
        "perplexity after pruning: output head",
        "saving out",
    ]


def test_a_log_file_gets_a_line_for_each_activity_and_one_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with Stages() as stages:
        for layer in range(1, 26):
            stages(f"collecting layer {layer} of 25", 2 * layer, 50, "micro-batches")
            stages(f"collecting layer {layer} of 25", 2 * layer + 1, 50, "micro-batches")
            clock[0] += 1.0
        stages("saving out", 0, 1, "folders")
    shown = capsys.readouterr().err
    assert shown.splitlines() == [*(f"collecting layer {layer} of 25" for layer in (1, 11, 21)), "saving out"]


def test_json_stands_alone_on_stdout(
    run: Run, small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = neuronrank_torch.runs.prune.open_model

    def chatty(*arguments: Any, **options: Any) -> Any:
        print("a library has something to say")
        return load(*arguments, **options)

    monkeypatch.setattr(neuronrank_torch.runs.prune, "open_model", chatty)
    result = run("prune", *small, "--pruning_last", 9, "--tf-exp", 0, "--save", "out", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "neuronrank.json").read_text("utf-8"))
    assert "a library has something to say" in result.stderr
    assert "Warning: --pruning_last is 9 but the model has 4 layers: all are pruned" in result.stderr
    measured = run("eval", "--model", "out", "--dataset", small[3], "--seqlen", 32, "--windows", 2, "--json")
    assert json.loads(measured.stdout)["windows"] == 2


def test_more_layers_than_there_are_means_all(run: Run, small: list[object]) -> None:
    result = run("prune", *small, "--prune_method", "magnitude", "--pruning_last", 30, "--save", "out", "--json")
    assert [layer["layer"] for layer in json.loads(result.stdout)["layers"]] == list(range(LAYERS))
    assert "--pruning_last is 30" in result.stderr
    result = run("prune", *small, "--prune_method", "magnitude", "--pruning_last", LAYERS, "--save", "out2")
    assert "--pruning_last" not in result.stderr


def test_a_dry_run_does_not_promise_what_the_allocation_decides(run: Run, small: list[object]) -> None:
    shown = run("prune", *small, "--dry-run", "--allocate", "neuronrank")
    assert "--allocate sets the ratio of each layer during the run: only the total below is exact" in shown.stderr
    assert "--allocate" not in run("prune", *small, "--dry-run").stderr


def test_a_dry_run_plans_what_a_run_does(run: Run, small: list[object], tmp_path: Path) -> None:
    arguments = [*small, "--save", "out", "--pruning-last", 3, "--sparsity-ratio", 0.37, "--nr-include-attention"]
    shown = run("prune", *arguments, "--dry-run")
    planned = json.loads(run("prune", *arguments, "--dry-run", "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    assert "dry run: nothing was calibrated, pruned or saved" in shown.stdout
    assert "calibration: 4 sequences of 32 tokens" in shown.stdout
    assert "seconds" not in shown.stdout
    assert "saved to" not in shown.stdout
    done = json.loads(run("prune", *arguments, "--json").stdout)
    for report in (planned, done):
        for layer in report["layers"]:
            del layer["seconds"]
    assert planned["layers"] == done["layers"]
    assert planned["total"] == done["total"]
    assert planned["recipe"] == done["recipe"]


@pytest.mark.parametrize("kind", ["layers", "layers-by-influence"])
def test_a_dry_run_plans_how_many_layers_go(run: Run, small: list[object], tmp_path: Path, kind: str) -> None:
    arguments = [*small, "--sparsity_type", kind, "--sparsity-ratio", 0.5, "--save", "out"]
    shown = run("prune", *arguments, "--dry-run")
    planned = json.loads(run("prune", *arguments, "--dry-run", "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    done = json.loads(run("prune", *arguments, "--json").stdout)
    assert planned["total"] == done["total"]
    assert f"2 of 4 layers to remove, with {done['total']['removed']:,} parameters" in shown.stdout
    assert "which layers go is measured during the run" in shown.stderr


@pytest.mark.parametrize("way", [["--save", "out"], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("asked", [["--target-params", 0.8], ["--max-loss", 0.5], ["--effort", "best"]], ids=str)
def test_candidates_are_compared_on_text_that_the_method_does_not_need(
    run: Run, small: list[object], asked: list[object], way: list[object]
) -> None:
    by_weights = ["--prune_method", "magnitude", "--update", "none", "--nsamples", 16]
    assert "no effect" not in run("prune", *small, *asked, *by_weights, *way).stderr


def test_a_target_says_what_it_chose_and_why(run: Run, small: list[object], tmp_path: Path) -> None:
    arguments = [*small, "--nsamples", 16, "--target-params", "80%"]
    planned = run("prune", *arguments, "--save", "out", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    done = run("prune", *arguments, "--save", "out")
    result = json.loads((tmp_path / "out" / "neuronrank.json").read_text("utf-8"))
    choice = result["choice"]
    for name in choice["perplexity"]:
        assert name in planned.stderr
    cost = choice["perplexity"][choice["chosen"]]
    assert (
        f"chose: {choice['chosen']}: held-out perplexity {cost:.4f}, {cost / choice['dense'] - 1:+.2%} from the dense"
        in done.stdout
    )
    assert done.stdout.count("compared: ") == len(choice["perplexity"]) - 1
    share = f"{choice['kept'] / choice['parameters']:.2%} of the {choice['parameters']:,} parameters outside"
    assert f"size: {share} the embeddings; the width of the MLPs is a multiple of " in done.stdout
    first = next(iter(choice["perplexity"]))
    assert "planned is the first" in planned.stderr
    assert "weights: " in planned.stdout
    assert first.split(" of ")[0].isdigit()
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"| removed | {choice['chosen']} |" in card
    assert "--target-params 0.8" in card


@pytest.fixture
def holed(model: Path, tmp_path: Path) -> Path:
    """A model with more zeros in some rows of its last layer than a ratio of a half asks for."""
    dense, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        dense.model.layers[LAYERS - 1].mlp.gate_proj.weight[:10, :30] = 0
    dense.save_pretrained(tmp_path / "holed")
    tokenizer.save_pretrained(tmp_path / "holed")
    return tmp_path / "holed"


@pytest.mark.parametrize(
    "flags",
    [
        ["--sparsity_type", "2:4", "--nr-include-attention"],
        ["--compare", "row"],
        ["--compare", "column"],
        ["--compare", "module", "--prune_method", "magnitude", "--sparsity_ratio", 0.04],
        ["--sparsity_type", "neurons", "--sparsity_ratio", 0.3],
        ["--pruning_last", 1, "--prune_method", "magnitude", "--sparsity_ratio", 0.04],
    ],
    ids=str,
)
def test_a_dry_run_counts_the_zeros_that_are_there(
    run: Run, small: list[object], holed: Path, flags: list[Any]
) -> None:
    arguments = ["--model", holed, *small[2:], *flags, "--save", "out"]
    planned, done = (json.loads(run("prune", *arguments, "--json", *more).stdout) for more in (["--dry-run"], []))
    if "neurons" in flags:
        assert done["total"]["removed"] == planned["total"]["removed"] == LAYERS * 3 * 32 * 19
        assert done["layers"][-1]["modules"]["gate_proj"]["sparsity"] == 19 / 64
    else:
        assert done["total"] == planned["total"]
        assert [layer["modules"] for layer in done["layers"]] == [layer["modules"] for layer in planned["layers"]]
        assert done["layers"][-1]["modules"]["gate_proj"]["zeros_before"] == 300
    assert done["total"]["parameters"] == planned["total"]["parameters"]


@pytest.mark.parametrize("bos", ["window", "text"])
def test_eval_prints_perplexity_with_its_protocol(run: Run, model: Path, text: Path, bos: str) -> None:
    arguments = ["--model", model, "--dataset", text, "--seqlen", 48, "--windows", 3, "--bos", bos, "--batch-size", 2]
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    words = load_text(str(text), "evaluation")
    expected = evaluate(loaded, tokenizer, words, seqlen=48, windows=3, bos_mode=bos, batch_size=2)
    lines = run("eval", *arguments).stdout.splitlines()
    where = {"window": "BOS at every window", "text": "BOS at the start of the text"}[bos]
    assert lines == [
        f"perplexity: {expected.perplexity:.4f} (standard error {expected.standard_error:.4f})",
        f"measured on: {text}, 3 windows of 48 tokens, {where}",
    ]
    measured, named = json.loads(run("eval", *arguments, "--json").stdout), {"model": str(model), "dataset": str(text)}
    assert measured == {"schema": 1, "notes": [], "reference": None, **named, **expected.to_dict()}


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Stages() as stages:
        stages("loading [red]models[/red]", 0, 1, "models")
        stages.bar.refresh()
        stages("perplexity", 5, 9, "windows")
        stages.bar.refresh()
        print("chatter")
        stages("perplexity before pruning: layer 12 of 30", 5, 30, "layers")
        stages.bar.refresh()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "chatter" in shown.err
    assert "loading [red]models[/red]" in shown.err
    assert "5/9 windows" in shown.err
    assert "\x1b[" in shown.err
    plain = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split(r"[\r\n]", shown.err)]
    assert any(line.startswith("perplexity before pruning: layer 12 of 30 ") for line in plain)
    assert max(map(len, plain)) <= 80


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "dumb")
    with Stages() as stages:
        stages("loading [red]", 0, 1, "models")
        stages("perplexity", 5, 9, "windows")
        stages("perplexity", 6, 9, "windows")
    assert capsys.readouterr().err == "loading [red]\nperplexity\n"


def test_lines_on_a_terminal_break_at_spaces(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "36")
    text = (
        "the flag --nr-include-attention is like --nr-skip-attention and /a/path/that/is/longer/than/forty/columns.txt"
    )
    console.warn(text)
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert " ".join(line.strip() for line in lines) == f"Warning: {text}"
    assert all(len(line) <= 36 for line in lines if "/a/path" not in line)
    assert len(lines) >= 4
    monkeypatch.delenv("TTY_COMPATIBLE")
    console.warn(text)
    assert capsys.readouterr().err == f"Warning: {text}\n"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(90, "90 s"), (150, "2 min"), (3599, "1 h 0 min"), (323 * 60, "5 h 23 min"), (30, "30 s")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert _duration(seconds) == shown


def test_errors_on_a_terminal_break_at_spaces(run: Run, small: list[object]) -> None:
    wide = {"TTY_COMPATIBLE": "1", "COLUMNS": "30", "TERM": "xterm"}
    for flags, message in (
        (["--eval", "--push-to-hub", "me/x"], "Error: --push-to-hub needs --save"),
        (["--save", "out", "--effort", "some"], "Error: Invalid value for '--effort': 'some' is not one of 'fast',"),
        (["--save", "out", "--nr-q-active", 60], "Error: --nr-q-active is 60.0, allowed: a number in (0, 1) Hint:"),
    ):
        lines = run("prune", *small, *flags, env=wide, code=2).stderr.splitlines()
        assert max(map(len, lines[2:])) <= 30
        assert message in " ".join(line.strip() for line in lines)


TABLES = {
    "fits": (("method", "0.5", "0.6"), ("wanda", "42.4600", "82.1300"), 30),
    "fits without a frame": (
        ("method", "update", "0.3", "0.5", "0.6", "0.7"),
        ("neuronrank_unstructured", "least-squares", "40.1234", "86.8512", "213.0012", "20032.4912"),
        80,
    ),
    "too wide": (tuple("abcdefgh"), ("neuronrank_unstructured", *["1234567.1234"] * 7), 123),
}


@pytest.mark.parametrize(("headings", "row", "width"), TABLES.values(), ids=TABLES)
def test_no_cell_of_a_table_is_broken(
    headings: tuple[str, ...], row: tuple[str, ...], width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    console.print_table(headings, [row, row], total=row, left=headings[:1])
    shown = capsys.readouterr().out
    for cell in row:
        assert shown.count(cell) == 3 * row.count(cell)
    for heading in headings:
        assert re.search(rf"(?:^|\s){re.escape(heading)}(?:\s|$)", shown)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert ("┃" in shown) == (width == 30)


def test_long_lines_are_wrapped_at_spaces_on_a_terminal(
    run: Run, small: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    model = ["--model", small[1], "--dataset", small[3], "--seqlen", 32, "--windows", 2]
    compared = [
        "compare",
        small[1],
        small[1],
        "--eval",
        "--eval-dataset",
        small[3],
        "--eval-windows",
        2,
        "--seqlen",
        32,
    ]
    for arguments in (["eval", *model, "--reference", small[1]], compared):
        shown = re.sub(r"\x1b\[[\d;]*m", "", run(*arguments).stdout)
        assert len([line for line in shown.splitlines() if line.startswith("  ")]) >= 1  # Folded.
        assert all(len(line) <= 80 or " " not in line.strip() for line in shown.splitlines())
        assert "99th percentile" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("value", "text"), [(27.43671, "27.4367"), (999_999.0, "999999.0000"), (1.23456e48, "1.235e+48"), (0.0, "0.0000")]
)
def test_a_perplexity_has_four_decimals_unless_it_is_huge(value: float, text: str) -> None:
    assert decimal(value) == text
    assert perplexity_text(Perplexity(value, 1.0, 31, 1, 32, None)) == text
