"""Calibration text that the model writes itself, and conversations: what the commands do with them."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command import LAYERS, Run, stop_after
from tiny import tiny_model, tiny_tokenizer
from tiny_files import write_model

from neuronrank_torch.pruning.passes import prune_in_passes
from neuronrank_torch.runs import own_text
from neuronrank_torch.runs import prune as runs

WRITING = "writing the calibration text"
CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


@pytest.fixture
def own(model: Path) -> list[object]:
    return ["--model", model, "--dataset", "self", "--nsamples", 4, "--seqlen", 48]


def weights(folder: str) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def texts(folder: str) -> list[str]:
    lines = (Path(folder) / "calibration.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize("flags", ["", "--effort best"])
def test_the_saved_text_gives_the_same_model(run: Run, own: list[object], measured: list[object], flags: str) -> None:
    command = ["prune", *own, *measured, *flags.split()]
    first = run(*command, "--save", "one")
    assert WRITING in first.stderr
    assert "whole: it writes the calibration text" in first.stderr
    assert len(texts("one")) == 4
    assert bool(re.search(r"^time: \d+ s, after \d+ s of comparison$", first.stdout, re.MULTILINE)) == bool(flags)
    run(*command, "--dataset", "one/calibration.jsonl", "--save", "given")
    assert weights("given") == weights("one")
    assert not Path("given/calibration.jsonl").exists()


def test_the_same_seed_writes_the_same_text(run: Run, own: list[object], measured: list[object]) -> None:
    command = ["prune", *own, *measured]
    run(*command, "--save", "one")
    run(*command, "--seed", 1, "--save", "other")
    assert texts("other") != texts("one")
    in_memory, saved = (json.loads(run(*command, *how, "--json").stdout) for how in ([], ["--save", "again"]))
    assert in_memory["calibration"] == saved["calibration"]
    assert in_memory["perplexity"] == saved["perplexity"]
    assert weights("again") == weights("one")
    assert Path("one/calibration.jsonl").stat().st_mode == Path("one/config.json").stat().st_mode


@pytest.mark.parametrize("units", [0, 1, LAYERS])
def test_an_interrupted_run_keeps_the_text(
    run: Run, own: list[object], monkeypatch: pytest.MonkeyPatch, units: int
) -> None:
    run("prune", *own, "--save", "whole")
    if units:
        lift = stop_after(monkeypatch, units, KeyboardInterrupt())
        kept = f"{units} of {LAYERS} layers are finished and saved"
    else:
        monkeypatch.setattr(runs, "prune_in_passes", lambda *_, **__: 1 / 0)
        lift = partial(monkeypatch.setattr, runs, "prune_in_passes", prune_in_passes)
        kept = "the calibration text is written and saved"
    stopped = run("prune", *own, "--save", "out", code=None)
    assert f"{kept}: rerun the same command to resume" in stopped.stderr
    lift()
    finished = run("prune", *own, "--save", "out")
    assert WRITING not in finished.stderr
    assert weights("out") == weights("whole")
    assert texts("out") == texts("whole")


def test_a_run_that_prunes_in_memory_saves_the_text(run: Run, own: list[object]) -> None:
    run("prune", *own, "--save", "weights")
    run("prune", *own, "--sparsity_type", "layers", "--save", "layers")
    assert texts("layers") == texts("weights")


def test_a_discarded_run_does_not_leave_its_text(run: Run, own: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    lift = stop_after(monkeypatch, 1, KeyboardInterrupt())
    run("prune", *own, "--save", "out", code=130)
    lift()
    changed = ["prune", *own, "--seed", 5, "--save", "out"]
    assert "seed was 0, is 5" in run(*changed, code=2).stderr
    assert WRITING in run(*changed, "--force").stderr
    run(*changed[:-1], "fresh")
    assert texts("out") == texts("fresh")


def test_dry_run_writes_no_text(run: Run, own: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "sample", lambda *_: 1 / 0)
    planned = run("prune", *own, "--save", "out", "--dry-run")
    assert "a dry run writes no text" in planned.stderr
    plan = json.loads(run("prune", *own, "--save", "out", "--dry-run", "--json").stdout)["plan"]
    streamed = json.loads(run("prune", *own, "--dataset", "builtin", "--save", "out", "--dry-run", "--json").stdout)
    assert plan["memory"]["layers"] == LAYERS * streamed["plan"]["memory"]["layers"]
    assert list(Path().iterdir()) == []


def test_statistics_keep_their_text(run: Run, own: list[object]) -> None:
    flags = ["collect", *own, "--batch-size", 2]
    run(*flags, "--save", "whole")
    for part, documents in (("a", "0:2"), ("b", "2:4")):
        run(*flags, "--documents", documents, "--save", part)
    run("merge", "a", "b", "--save", "merged")
    assert texts("merged") == texts("whole")
    assert len(texts("whole")) == 4
    run(*flags, "--dataset", "whole/calibration.jsonl", "--save", "given")
    given, merged = (Path(folder, "layer-00001.safetensors").read_bytes() for folder in ("given", "merged"))
    assert given == merged
    run("prune", *own[:2], "--stats", "merged", "--save", "out")
    run("report", "out", "--stats", "merged", "--save", "page.html", "--new-tokens", 0, "--eval-windows", 0)
    assert "the calibration text with --dataset" not in Path("page.html").read_text("utf-8")
    same = ["--eval", "--eval-dataset", "merged/calibration.jsonl"]
    measured = run("prune", *own[:2], "--stats", "merged", "--seqlen", 48, *same)
    assert "the evaluation text is the calibration text" in measured.stderr


@pytest.mark.parametrize("command", ["eval", "verify"])
def test_other_commands_refuse_it(run: Run, model: Path, command: str) -> None:
    refused = run(command, "--model", model, "--dataset", "self", code=2)
    assert "`self` is a calibration text for `prune` and `collect` only" in refused.stderr


def test_a_file_called_self(run: Run, own: list[object], text: Path) -> None:
    Path("self").write_bytes(text.read_bytes())
    run("prune", *own, "--dataset", "./self", "--save", "file")
    run("prune", *own, "--dataset", text, "--save", "text")
    assert weights("file") == weights("text")
    assert WRITING in run("prune", *own, "--save", "own").stderr


def test_no_token_to_begin_with(run: Run, tmp_path: Path, own: list[object]) -> None:
    folder = write_model(tmp_path / "model", tiny_model(layers=1, hidden=32, intermediate=64))
    bare = tiny_tokenizer()
    bare.bos_token = bare.eos_token = None
    bare.save_pretrained(folder)
    for how in ("--dry-run", "--eval"):
        refused = run("prune", *own, "--model", folder, "--save", "out", how, code=2)
        assert "neither a beginning-of-sequence nor an end-of-sequence token" in refused.stderr
    assert not (tmp_path / ".out.partial").exists()


def test_chats_are_calibrated_and_measured_on(run: Run, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tiny_model(layers=2, hidden=32, intermediate=64))
    tokenizer = tiny_tokenizer(True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    said = [f"Sentence {i} has {i * i} as its square." for i in range(60)]
    chats: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": line}]} for line in said]
    rendered = [{"text": f"<s>user: {line}</s>"} for line in said]
    for name, records in {"chat.jsonl": chats, "text.jsonl": rendered}.items():
        Path(name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    results = {}
    for kind in ("chat", "text"):
        used = ["--dataset", f"{kind}.jsonl", "--eval", "--eval-dataset", f"{kind}.jsonl", "--eval-windows", 3]
        flags = ["--model", folder, "--nsamples", 4, "--seqlen", 32]
        result = json.loads(run("prune", *flags, *used, "--json", "--save", kind).stdout)
        planned = json.loads(run("prune", *flags, *used, "--dry-run", "--json").stdout)
        alone = json.loads(run("eval", "--model", kind, "--dataset", f"{kind}.jsonl", "--seqlen", 32, "--json").stdout)
        pair = run("eval", "--model", kind, "--reference", folder, "--dataset", f"{kind}.jsonl", "--seqlen", 32)
        results[kind] = (result["perplexity"], result["calibration"], planned["notes"], alone["perplexity"])
        assert pair.exit_code == 0
    assert results["chat"] == results["text"]
    assert weights("chat") == weights("text")
    run("verify", "--model", folder, "--dataset", "chat.jsonl", "--nsamples", 2, "--seqlen", 32)
    run("collect", "--model", folder, "--dataset", "chat.jsonl", "--nsamples", 2, "--seqlen", 32, "--save", "stats")
