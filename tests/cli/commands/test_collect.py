"""``collect``, ``merge`` and ``prune --stats`` as a user meets them."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from command import LAYERS, Run
from faults import refused
from tiny import VOCAB
from tiny_files import write_model
from transformers import AutoModelForCausalLM, GPT2Config

import neuronrank_torch.runs.collect
from neuronrank_cli.commands.collect import collect
from neuronrank_core import Recipe
from neuronrank_torch.runs.collect import CollectResult
from neuronrank_torch.runs.job import Job
from neuronrank_torch.saving.statistics_writer import StatisticsWriter

#: Flag to value, and what it changes: the job, the recipe or the documents.
FLAGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "--model": ("o", {"model": "o"}),
    "--device": ("cuda", {"device": "cuda"}),
    "--dtype": ("bfloat16", {"dtype": "bfloat16"}),
    "--dataset": ("d", {"dataset": "d"}),
    "--nsamples": (5, {"nsamples": 5}),
    "--seqlen": (33, {"seqlen": 33}),
    "--bos": ("text", {"bos": "text"}),
    "--seed": (7, {"seed": 7}),
    "--documents": ("8:16", {"documents": (8, 16)}),
    "--batch-size": (3, {"batch_size": 3}),
    "--nr-signal": ("product", {"signal": "product"}),
    "--threshold": (0.5, {"threshold": 0.5}),
    "--tokens-per-document": (9, {"tokens_per_document": 9}),
    "--save": ("t", {"save": "t"}),
    "--force": (True, {"force": True}),
    "--hidden-states": ("disk", {"hidden_states": "disk"}),
}


def weights(folder: str) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_of_collect_is_read(run: Run, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    assert {*FLAGS, "--json", "--config"} == {p.opts[0] for p in collect.params}
    seen: dict[str, Any] = {}

    def run_collect(job: Job, recipe: Recipe, documents: Any, progress: Any) -> CollectResult:
        assert callable(progress)
        seen.update({**recipe.__dict__, **job.__dict__, "documents": documents})
        return CollectResult(**{f.name: () for f in fields(CollectResult)})  # type: ignore[arg-type]

    monkeypatch.setattr(neuronrank_torch.runs.collect, "run_collect", run_collect)
    run("collect", "--model", "m", "--save", "s")
    assert seen == {**Recipe().__dict__, **Job("m", save="s").__dict__, "documents": None}
    before = dict(seen)
    value, changed = FLAGS[flag]
    run("collect", "--model", "m", "--save", "s", *([flag] if value is True else [flag, value]))
    assert seen == {**before, **changed}


def test_three_steps(run: Run, small: list[object], measured: list[object], tmp_path: Path) -> None:
    """In parts, merged, and pruned by: the weights that one run with dense propagation saves."""
    parts = [*small, "--batch-size", 2]
    shown = run("collect", *parts, "--documents", "0:2", "--save", "a")
    assert shown.stdout.splitlines()[-1] == "saved to: a"
    assert f"{LAYERS} layers, 2 of 4 sequences of 32 tokens" in shown.stdout
    header = json.loads(run("collect", *parts, "--documents", "2:4", "--save", "b", "--json").stdout)
    assert header["documents"] == [2, 3]
    assert "saved to: stats" in run("merge", "b", "a", "--save", "stats").stdout
    run("collect", *parts, "--save", "whole")
    assert files("stats") == files("whole")
    run("prune", *parts, "--propagate", "dense", "--save", "at-once")
    by_stats = ["prune", "--model", small[1], "--stats", "stats"]
    report = json.loads(run(*by_stats, "--save", "out", "--json", *measured).stdout)
    assert weights("out") == weights("at-once")
    assert report["calibration"]["statistics"] == "stats"
    assert (report["recipe"]["nsamples"], report["recipe"]["seqlen"]) == (4, 32)
    planned = run(*by_stats, "--dry-run").stdout
    assert f"calibration: 4 sequences of 32 tokens of {small[3]}" in planned
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "at-once", "b", "out", "stats", "whole"]


@pytest.mark.parametrize("layers", [1, LAYERS - 1, LAYERS])
def test_a_collection_that_was_cut_off_goes_on(
    run: Run, small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    run("collect", *small, "--save", "whole")
    keep, kept = StatisticsWriter.keep, []

    def keep_and_stop(self: StatisticsWriter, unit: Any, table: Any) -> None:
        keep(self, unit, table)
        kept.append(unit)
        if len(kept) == layers:
            raise KeyboardInterrupt

    monkeypatch.setattr(StatisticsWriter, "keep", keep_and_stop)
    stopped = run("collect", *small, "--save", "out", code=130)
    note = f"{layers} of {LAYERS} layers are finished and saved: rerun the same command to resume"
    assert stopped.stderr.splitlines()[-1] == f"Interrupted; {note}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "whole"]
    refused = run("collect", *small, "--seed", 1, "--save", "out", code=2)
    assert "differs from this one: seed was 0, is 1" in refused.stderr
    monkeypatch.setattr(StatisticsWriter, "keep", keep)
    finished = run("collect", *small, "--save", "out")
    assert f"resuming: {layers} of {LAYERS} layers are finished" in finished.stderr
    assert files("out") == files("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("collect --documents 3", "'--documents': '3' is not FROM:TO"),
        ("collect --documents 0:9", "--documents is '0:9', allowed: FROM:TO with 0 <= FROM < TO <= 4"),
        ("collect --documents 1:4 --batch-size 2", "--documents is '1:4', allowed: multiples of the micro-batch of 2"),
        ("collect --dataset gone.txt", "file not found: gone.txt"),
        ("collect --save there", "there already exists"),
        ("collect --save model --force", "model is not a statistics folder"),
        ("prune --stats gone --save out", "gone is not a statistics folder"),
        ("prune --stats there --save there --force", "there is not a saved model"),
        ("prune --stats there --save out --update least-squares", "--update least-squares needs calibration text"),
        (
            "prune --stats there --save out --prune_method neuronrank_old --nr-signal product",
            "--nr-signal is 'product', allowed: gate, which there was collected with",
        ),
    ],
)
def test_wrong_input(run: Run, small: list[object], tmp_path: Path, arguments: str, message: str) -> None:
    run("collect", *small, "--save", "there")
    run("prune", *small, "--prune_method", "magnitude", "--save", "model")
    before = files("there")
    command, *flags = arguments.split()
    base = small if command == "collect" else small[:2]
    save = [] if "--save" in flags else ["--save", "out"]
    refused = run(command, *base, *save, *flags, code=2)
    assert refused.stdout == ""
    assert message in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "there"]
    assert files("there") == before


def test_only_statistics_are_replaced_by_force(run: Run, small: list[object]) -> None:
    run("collect", *small, "--save", "stats")
    run("collect", *small, "--seed", 1, "--save", "stats", "--force")
    assert json.loads(Path("stats/statistics.json").read_text())["seed"] == 1


def test_measuring_on_the_calibration_text_is_named(run: Run, small: list[object], measured: list[object]) -> None:
    warning = "Warning: the evaluation text is the calibration text"
    assert warning in run("prune", *small, *measured).stderr
    run("collect", *small, "--save", "stats")
    assert warning in run("prune", *small[:2], "--stats", "stats", *measured, "--seqlen", 32).stderr
    other = ["--eval", "--eval-dataset", "builtin", "--eval-windows", 2, "--seqlen", 32]
    assert "evaluation text" not in run("prune", *small[:2], "--stats", "stats", *other).stderr


def test_a_signal_without_effect_is_warned_of_and_the_measured_one_is_named(run: Run, text: Path) -> None:
    config = GPT2Config(
        n_embd=24, n_inner=56, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCAB, bos_token_id=0, eos_token_id=1
    )
    write_model("plain", AutoModelForCausalLM.from_config(config), bos=False)
    small: list[object] = ["--model", "plain", "--dataset", text, "--nsamples", 4, "--seqlen", 32]
    tfidf, warning = ["--prune_method", "neuronrank_tfidf"], "--nr-signal gate has no effect on MLPs without a gate"
    asked = ["--nr-signal", "gate"]
    assert "--nr-signal" not in run("collect", *small, "--save", "stats").stderr
    result = run("collect", *small, *asked, "--save", "stats", "--force")
    assert warning in result.stderr
    assert "signal product" in result.stdout
    for how in (["--dry-run"], ["--save", "a"], ["--stats", "stats", "--save", "b"]):
        assert "--nr-signal" not in run("prune", *small, *tfidf, "--nr-signal", "product", *how).stderr
        result = run("prune", *small, *tfidf, *asked, *how, "--json", *([] if "--dry-run" in how else ["--force"]))
        assert result.stderr.count("--nr-signal") == result.stderr.count(warning) == 1
        assert json.loads(result.stdout)["recipe"]["signal"] == "product"
    unread = run("prune", *small, "--prune_method", "wanda", *asked, "--dry-run").stderr
    assert unread.count("--nr-signal") == unread.count("--nr-signal has no effect on wanda") == 1
    run("report", "b", "--stats", "stats", "--new-tokens", 0, "--save", "page.html")
    page = Path("page.html").read_text("utf-8")
    assert "<code>--nr-signal</code></dt><dd>product<" in page
    assert "signal “product”" in page


def test_the_folder_with_the_text_is_not_replaced(run: Run, small: list[object], text: Path) -> None:
    flags = [flag for flag in small if flag not in ("--dataset", text)]
    run("collect", *small, "--save", "stats")
    Path("stats/notes.txt").write_text(text.read_text())
    says = f"{Path('stats').resolve()} contains the calibration text (stats/notes.txt)"
    refused(run, "collect", *flags, "--dataset", "stats/notes.txt", "--save", "stats", "--force", code=2, says=says)
