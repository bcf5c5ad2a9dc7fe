"""``eval --tasks``: what is handed to lm-eval, what comes back, and a run of lm-eval itself on a task of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from command import Run
from faults import predicts_nan
from transformers import AutoModelForCausalLM, AutoTokenizer

import neuronrank_torch.runs.tasks

RESULTS = {
    "results": {"cats": {"alias": "cats", "acc,none": 0.75, "acc_stderr,none": float("nan"), "f1,strict": 0.5}},
    "versions": {"cats": 2.0},
    "n-shot": {"cats": 3},
}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for lm-eval; collects what it is handed."""
    seen: dict[str, Any] = {}

    def simple_evaluate(**arguments: Any) -> Any:
        seen.update(arguments)
        if "unknown" in arguments["tasks"]:
            raise KeyError("unknown")
        return RESULTS

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **arguments: SimpleNamespace(**arguments)},
        "lm_eval.tasks": {"TaskManager": lambda include_path: f"tasks of {include_path}"},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(neuronrank_torch.runs.tasks, "version", lambda name: f"{name} 1.0")
    return seen


def test_what_is_handed_over(run: Run, model: Path, harness: dict[str, Any]) -> None:
    Path("mine").mkdir()
    flags = ["--include-path", "mine", "--fewshot", 3, "--limit", 5, "--batch-size", 2]
    result = json.loads(run("eval", "--model", model, "--tasks", "cats, dogs,", *flags, "--json").stdout)
    assert harness["tasks"] == ["cats", "dogs"]
    assert (harness["num_fewshot"], harness["limit"], harness["batch_size"]) == (3, 5, 2)
    assert harness["task_manager"] == "tasks of mine"
    assert type(harness["model"].pretrained).__name__ == "LlamaForCausalLM"
    assert harness["model"].tokenizer("a")["input_ids"]
    assert harness["model"].batch_size == 2
    assert result["tasks"]["cats"] == {**RESULTS["results"]["cats"], "acc_stderr,none": None}
    assert (result["task_versions"], result["fewshot"], result["limit"]) == ({"cats": 2.0}, {"cats": 3}, 5)


def test_the_table_of_tasks(run: Run, model: Path, harness: dict[str, Any]) -> None:
    shown = run("eval", "--model", model, "--tasks", "cats").stdout
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert cells == [["cats", "3", "acc", "0.7500", ""], ["cats", "3", "f1 (strict)", "0.5000", ""]]
    assert shown.splitlines()[-1] == "measured on: all questions, with lm-eval lm-eval 1.0"
    assert (harness["num_fewshot"], harness["limit"]) == (None, None)


@pytest.mark.usefixtures("harness")
def test_what_goes_wrong_is_one_line(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        "Error: lm-eval failed on unknown: KeyError"
        in run("eval", "--model", model, "--tasks", "unknown", code=1).stderr
    )
    assert "Error: --tasks does not name a task" in run("eval", "--model", model, "--tasks", " ,", code=2).stderr
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    stderr = run("eval", "--model", model, "--tasks", "cats", code=2).stderr
    assert "Error: --tasks needs lm-eval" in stderr
    assert "Hint: pip install 'neuronrank[eval]'" in stderr


@pytest.mark.usefixtures("harness")
def test_flags_of_the_other_kind_have_no_effect(run: Run, model: Path, text: Path) -> None:
    stderr = run("eval", "--model", model, "--tasks", "cats", "--seqlen", 9, "--windows", 2).stderr
    assert "--seqlen has no effect with --tasks" in stderr
    assert "--windows has no effect with --tasks" in stderr
    stderr = run("eval", "--model", model, "--dataset", text, "--seqlen", 32, "--windows", 1, "--limit", 4).stderr
    assert "--limit has no effect without --tasks" in stderr
    assert "--seqlen" not in stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_itself_on_a_task_of_our_own(model: Path, tmp_path: Path) -> None:
    """The model's choice between two continuations, as its own likelihoods have it."""
    questions = [("one two", (" three", " xyzzy")), ("abc", (" q", " de")), ("Sentence 3", (" has", "!!!"))]
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def likelihood(question: str, choice: str) -> float:
        ids = tokenizer(question + choice, return_tensors="pt")["input_ids"]
        scores = loaded(ids).logits[0, :-1].log_softmax(-1)
        told = scores.gather(1, ids[0, 1:, None])[:, 0]
        return float(told[-len(choice.encode()) :].sum().item())

    # The first answer is always right, so accuracy is how often the model likes it better.
    expected = sum(likelihood(q, c[0]) > likelihood(q, c[1]) for q, c in questions) / len(questions)
    rows = [{"question": q, "choices": list(c)} for q, c in questions]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ours.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    command = [sys.executable, "-m", "neuronrank_cli", "eval", "--model", str(model), "--tasks", "ours", "--json"]
    done = subprocess.run(
        [*command, "--include-path", str(tmp_path / "tasks")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tasks"]["ours"]["acc,none"] == pytest.approx(expected)
    assert result["fewshot"] == {"ours": 0}


@pytest.mark.usefixtures("harness")
def test_a_model_that_predicts_nan_has_no_accuracy(run: Run, model: Path) -> None:
    assert (
        "the model predicts NaN or Inf" in run("eval", "--model", predicts_nan(model), "--tasks", "cats", code=1).stderr
    )


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("path", ["gone", "one.yaml"])
def test_tasks_are_in_a_folder(run: Run, path: str) -> None:
    Path("one.yaml").touch()
    flags = ["--model", "./gone", "--tasks", "cats", "--include-path", path]
    assert f"--include-path {path} is not a folder" in run("eval", *flags, code=2).stderr
