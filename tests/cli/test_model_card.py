"""The model card of the output, and its way to the hub."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import Run
from huggingface_hub import HfApi, ModelCard
from tiny import tiny_model
from tiny_files import write_gguf, write_model

from neuronrank_core import Recipe
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.prune import run_prune

CARD = """---
license: other
license_name: tiny-licence
language: [de]
tags: [own]
base_model: org/earlier
model-index: [{name: figures of another model}]
---
# The card of the source: *its* text
"""


@pytest.fixture
def carded(tmp_path: Path) -> Path:
    """A model with a card of its own."""
    folder = write_model(tmp_path / "carded", tiny_model(layers=4, hidden=32, intermediate=64))
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def test_the_card(run: Run, small: list[object], measured: list[object], tmp_path: Path) -> None:
    arguments = [*small, *measured, "--prune_method", "wanda", "--nr-include-attention", "--save", "out", "--json"]
    done = run("prune", *arguments, env={"NEURONRANK_PRUNE_SPARSITY_RATIO": "0.25"})
    assert "Warning: README" not in done.stderr
    result, card = json.loads(done.stdout), ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {"library_name": "transformers", "tags": ["pruned", "neuronrank"]}
    assert card.text.lstrip().startswith(f"# {Path(str(small[1])).name}, pruned\n")
    assert re.findall(r"^\| `(\w+)` \| ([^|]+) \|$", card.text, re.MULTILINE) == [
        ("method", "wanda"),
        ("sparsity_type", "unstructured"),
        ("sparsity_ratio", "0.25"),
        ("include_attention", "True"),
        ("nsamples", "4"),
        ("seqlen", "32"),
    ]
    assert "| `gate_proj` | 8,192 | 2,048 | 0 | 25.00% |" in card.text
    assert "| `q_proj` | 4,096 | 1,024 | 0 | 25.00% |" in card.text
    moved = result["perplexity"]
    change = moved["divergence"]
    quality = card.text.partition("## Quality")[2].partition("## Limits")[0].split("\n")
    assert [line for line in quality if line.startswith("|")] == [
        f"| measure, on {measured[2]}, 2 windows of 32 tokens | value |",
        "| --- | --- |",
        f"| perplexity before | {moved['before']['perplexity']:.4f} |",
        f"| perplexity after | {moved['after']['perplexity']:.4f} |",
        f"| change | {change['perplexity_change']:+.2%} ± {change['perplexity_change_error']:.2%} |",
        f"| KL divergence from the base model, nats per token | {change['kl_mean']:.4g} |",
        f"| same most likely token | {change['agreement']:.2%} |",
    ]
    assert "Faster: no" in card.text
    assert "Licence: not named" in card.text
    assert "@software{neuronrank" in card.text
    [command] = re.findall(r"```bash\nneuronrank (.*)\n```", card.text)
    assert "--sparsity_ratio 0.25" in command
    again = run(*shlex.split(command), "--force", "--json").stdout
    assert json.loads(again)["perplexity"] == moved


def test_the_card_of_the_source_is_kept(run: Run, small: list[object], carded: Path, tmp_path: Path) -> None:
    shown = run("prune", "--model", carded, *small[2:], "--save", "out", "--sparsity_type", "neurons")
    assert "Warning: README.md of the source is kept as README-base-model.md" in shown.stderr
    assert (tmp_path / "out" / "README-base-model.md").read_text("utf-8") == CARD
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "other",
        "license_name": "tiny-licence",
        "language": ["de"],
        "base_model": "org/earlier",
        "tags": ["own", "pruned", "neuronrank"],
    }
    assert "| `down_proj` | 8,192 | 0 | 4,096 | 50.00% |" in card.text
    assert "Not measured." in card.text
    assert "- Faster: yes: the removed neurons are neither computed nor stored.\n" in card.text


@pytest.mark.parametrize(("said", "tags"), [("tags: own\n", ["own"]), ("tags: [pruned]\n", []), ("", [])])
def test_tags_of_the_source(
    said: str, tags: list[str], run: Run, small: list[object], carded: Path, tmp_path: Path
) -> None:
    (carded / "README.md").write_text(f"---\nlicense: mit\n{said}---\n", encoding="utf-8")
    shown = run("prune", "--model", carded, *small[2:], "--save", "out")
    assert "cannot be read" not in shown.stderr
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.tags == [*tags, "pruned", "neuronrank"]
    assert "Licence: mit." in card.text


def test_a_run_from_python_has_no_command(model: Path, tmp_path: Path) -> None:
    run_prune(Job(str(model), save=str(tmp_path / "out")), Recipe("magnitude"))
    assert "```bash\n# called from Python\n```" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_unreadable_metadata_is_said(run: Run, small: list[object], carded: Path, tmp_path: Path) -> None:
    (carded / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    shown = run("prune", "--model", carded, *small[2:], "--save", "out")
    assert "Warning: the metadata in README.md of the source cannot be read: " in shown.stderr
    assert (tmp_path / "out" / "README.md").is_file()


def test_the_base_model_is_that_on_the_hub(
    run: Run, small: list[object], carded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(carded))
    run("prune", "--model", "org/tiny", *small[2:], "--save", "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "org/tiny"


@pytest.mark.parametrize("licence", ["", "apache-2.0"])
def test_a_gguf_file_names_its_licence_itself(
    licence: str, run: Run, small: list[object], carded: Path, tmp_path: Path
) -> None:
    """Its folder may hold the card of anything: here one with another licence."""
    write_gguf(carded / "tiny.gguf", tiny_model(layers=2, hidden=32, intermediate=64), licence=licence)
    run("prune", "--model", "carded/tiny.gguf", *small[2:], "--prune_method", "magnitude", "--save", "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == (licence or None)
    assert card.text.lstrip().startswith("# tiny.gguf, pruned\n")
    assert not (tmp_path / "out" / "README-base-model.md").exists()


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What is asked of the hub, instead of asking it."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create(_: HfApi, repo_id: str, **options: Any) -> None:
        calls.append(("create", {"repo_id": repo_id, **options}))

    def upload(_: HfApi, **options: Any) -> None:
        assert (Path(options["folder_path"]) / "neuronrank.json").is_file()
        calls.append(("upload", options))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return calls


def test_push(run: Run, small: list[object], pushed: list[tuple[str, dict[str, Any]]]) -> None:
    push = ["--save", "out", "--push-to-hub", "me/tiny-pruned"]
    assert run("prune", *small, *push).stdout.splitlines()[-1] == "pushed to: https://huggingface.co/me/tiny-pruned"
    assert pushed[0] == ("create", {"repo_id": "me/tiny-pruned", "private": True, "exist_ok": True})
    assert [name for name, _ in pushed] == ["create", "upload"]
    assert (pushed[1][1]["repo_id"], pushed[1][1]["folder_path"]) == ("me/tiny-pruned", "out")
    json.loads(run("prune", *small, *push, "--force", "--json").stdout)
    assert len(pushed) == 4
    shown = run("prune", *small, *push, "--force", "--dry-run")
    assert "--push-to-hub has no effect with --dry-run" in shown.stderr
    run("prune", *small, "--save", "other")
    assert len(pushed) == 4


def test_push_is_refused_before_the_run(
    run: Run, small: list[object], tmp_path: Path, pushed: list[tuple[str, dict[str, Any]]]
) -> None:
    assert "--push-to-hub needs --save" in run("prune", *small, "--eval", "--push-to-hub", "me/x", code=2).stderr
    wrong = run("prune", *small, "--save", "out", "--push-to-hub", "a/b/c", code=2)
    assert wrong.stderr.startswith("Error: --push-to-hub: ")
    assert "loading" not in wrong.stderr
    assert not pushed
    assert not (tmp_path / "out").exists()


def test_a_failed_push_leaves_the_model(
    run: Run, small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    failed = run("prune", *small, "--save", "out", "--push-to-hub", "me/x", code=1)
    assert "Error: could not push to me/x: no route\nHint: the model is saved in out; " in failed.stderr
    assert "saved to: out" in failed.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_folder_in_which_the_command_runs(run: Run, small: list[object], tmp_path: Path) -> None:
    shutil.copytree(str(small[1]), tmp_path, dirs_exist_ok=True)
    run("prune", "--model", ".", *small[2:], "--prune_method", "magnitude", "--save", "../beside")
    card = (tmp_path.parent / "beside" / "README.md").read_text("utf-8")
    assert f"\n# {tmp_path.name}, pruned\n" in card
