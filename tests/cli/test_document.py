"""The usage examples and recipes of the user's document, on a tiny model: exact zeros, and every flag matters."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from command import LAYERS, Run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from neuronrank_core import Recipe

COMMON = "--prune_method neuronrank_tfidf --sparsity_type unstructured --sparsity_ratio 0.5 --pruning_last 30"
#: As in the document, less the model's name.
EXAMPLES = {
    "doc": "--nr-tfidf-mode doc --weight-exp 1.0 --tf-exp 1.0 --idf-exp 1.5 --nsamples 128 --save out/nr_tfidf_doc/",
    "topic": "--nr-tfidf-mode topic --nr-tfidf-k 128 --weight-exp 1.0 --tf-exp 1.0 --idf-exp 2.0 --nsamples 256 "
    "--save out/nr_tfidf_topic/",
    "strong": "--nr-tfidf-mode doc --weight-exp 1.0 --tf-exp 2.0 --idf-exp 1.0 --save out/nr_tfidf_strong_act/",
    "selective": "--nr-tfidf-mode topic --nr-tfidf-k 64 --weight-exp 0.5 --tf-exp 0.5 --idf-exp 2.5 "
    "--save out/nr_tfidf_selective/",
    "spiky": "--nr-tfidf-mode topic --nr-tfidf-k 64 --weight-exp 1.0 --tf-exp 1.5 --idf-exp 1.5 "
    "--nr-spikiness-exp 0.5 --save out/nr_tfidf_spiky/",
}
Weights = dict[str, torch.Tensor]


def load(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("last", [LAYERS, 2])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples(run: Run, small: list[object], model: Path, tmp_path: Path, example: str, last: int) -> None:
    arguments = shlex.split(f"{COMMON} {EXAMPLES[example]}")
    shrunk = [*arguments, *small, *(["--nr-tfidf-k", 16] if "topic" in arguments else [])]
    result = run("prune", *shrunk, *(["--pruning_last", last] if last < LAYERS else []))
    assert ("--pruning_last is 30" in result.stderr) == (last == LAYERS)
    out = tmp_path / arguments[-1]
    dense, pruned = load(model), load(out)
    report = json.loads((out / "neuronrank.json").read_text("utf-8"))
    modules = {
        f"model.layers.{layer['layer']}.mlp.{name}.weight": module
        for layer in report["layers"]
        for name, module in layer["modules"].items()
    }
    assert len(modules) == 3 * last
    assert all(f"layers.{LAYERS - last}." <= name[6:] for name in modules)
    assert dense.keys() == pruned.keys()
    for name, weight in pruned.items():
        zeros = int((weight == 0).sum())
        if name in modules:
            assert zeros == weight.numel() // 2
            assert modules[name] == {
                "size": weight.numel(),
                "zeros": zeros,
                "removed": 0,
                "zeros_before": 0,
                "sparsity": 0.5,
            }
            assert torch.equal(weight[weight != 0], dense[name][weight != 0])
        else:
            assert torch.equal(weight, dense[name])
    assert report["total"]["zeros"] == sum(module["zeros"] for module in modules.values())
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(value, pruned[name]) for name, value in plain.state_dict().items() if name in pruned)
    assert plain.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False, pad_token_id=1).shape == (1, 8)


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ("", "--idf-exp 2.5"),
        ("", "--tf-exp 0.5"),
        ("", "--weight-exp 0.5"),
        ("", "--nr-spikiness-exp 1"),
        ("", "--input-exp 1"),
        ("", "--nr-q-active 0.8"),
        ("", "--nr-tfidf-mode topic --nr-tfidf-k 8"),
        ("", "--nr-tfidf-mode token"),
        ("", "--nr-signal product"),
        ("", "--compare row"),
        ("", "--sparsity_type 2:4"),
        ("", "--sparsity_ratio 0.6"),
        ("", "--nsamples 6"),
        ("", "--seqlen 40"),
        ("", "--seed 1"),
        ("", "--bos text"),
        ("", "--propagate dense"),
        ("", "--tokens-per-document 8"),
        ("", "--nr-include-attention"),
        ("", "--dataset builtin"),
        ("", "--prune_method neuronrank_wanda"),
        ("", "--preset aggressive"),
        ("--nr-tfidf-mode topic --nr-tfidf-k 8", "--nr-tfidf-k 16"),
        ("--nr-tfidf-mode topic --nr-tfidf-k 8", "--seed 1"),
        ("--nr-tfidf-mode token", "--threshold 0.5"),
        ("--prune_method neuronrank_unstructured", "--variance-exp 2"),
        ("--prune_method neuronrank_unstructured", "--magnitude-multi 2"),
        ("--prune_method neuronrank_unstructured --magnitude-multi 1", "--variance-multi 0"),
        ("--prune_method neuronrank_unstructured", "--token-weight 0"),
    ],
)
def test_another_value_gives_other_weights(
    run: Run, small: list[object], tmp_path: Path, base: str, change: str
) -> None:
    common = ["--prune_method", "neuronrank_tfidf", *small, "--pruning_last", 2, *base.split()]
    run("prune", *common, "--save", "one")
    result = run("prune", *common, *change.split(), "--save", "other")
    assert "has no effect" not in result.stderr
    assert not equal(load(tmp_path / "one"), load(tmp_path / "other"))


@pytest.mark.parametrize(
    ("preset", "flags"),
    [
        ("conservative", "--idf-exp 1.0 --tf-exp 1.5 --weight-exp 1.0"),
        ("balanced", "--idf-exp 1.5 --tf-exp 1.0 --weight-exp 1.0"),
        ("aggressive", "--idf-exp 2.5 --tf-exp 1.0 --weight-exp 0.5"),
    ],
)
def test_presets_are_the_documents_recipes(
    run: Run, small: list[object], tmp_path: Path, preset: str, flags: str
) -> None:
    run("prune", *small, "--prune-method", "neuronrank-tfidf", "--preset", preset, "--save", "one")
    run("prune", *small, "--prune-method", "neuronrank-tfidf", *flags.split(), "--save", "other")
    assert equal(load(tmp_path / "one"), load(tmp_path / "other"))


@pytest.mark.parametrize(
    "arguments",
    [
        "--prune_method neuronrank_tfidf --nr-tfidf-mode topic --nr-tfidf-k 8 --idf-exp 2 --seed 3 --compare row",
        "--preset aggressive --sparsity_type 2:4 --bos text --propagate dense",
        "--sparsity_ratio 0.37 --pruning_last 2 --nr-include-attention --dtype bfloat16 --batch-size 3",
    ],
)
def test_a_run_repeats_from_its_report(
    run: Run, small: list[object], measured: list[object], tmp_path: Path, arguments: str
) -> None:
    run("prune", *small, *arguments.split(), *measured, "--save", "one")
    report = json.loads((tmp_path / "one" / "neuronrank.json").read_text("utf-8"))
    assert {"recipe", "job", "versions", "layers", "calibration", "perplexity"} <= report.keys()
    assert {"neuronrank", "python", "numpy", "torch", "transformers"} == report["versions"].keys()
    unset = ("compare", "pruning_last", "multiple_of")
    assert None not in [value for name, value in report["recipe"].items() if name not in unset]

    # By the Python interface, and by the flags that set these fields.
    from neuronrank_cli.options import SPELLING
    from neuronrank_torch.runs.job import Evaluation, Job
    from neuronrank_torch.runs.prune import run_prune
    from neuronrank_torch.schema import to_json

    job = {**report["job"], "save": "two", "evaluation": Evaluation(**report["job"]["evaluation"])}
    del job["model_type"], job["processes"], job["dry_run"]
    again = run_prune(Job(**job), Recipe(**report["recipe"]))
    flags = []
    for name, value in report["recipe"].items():
        flags += [SPELLING[name]] if value is True else [] if value in (None, False) else [SPELLING[name], value]
    for name in ("model", "dataset", "dtype", "device", "batch_size"):
        flags += [] if report["job"][name] is None else [f"--{name}", report["job"][name]]
    run("prune", *flags, "--save", "three")
    assert equal(load(tmp_path / "one"), load(tmp_path / "two"))
    assert equal(load(tmp_path / "one"), load(tmp_path / "three"))
    assert to_json(again.perplexity) == report["perplexity"]
    assert to_json(again.calibration) == report["calibration"]
