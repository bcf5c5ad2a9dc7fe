"""A saved model loads in plain transformers, is written as a whole or not at all, and keeps its finished layers."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, safe_open
from staged import interrupted, keep_all, save_model, staging
from tiny import BOS, tiny_tokenizer
from tiny_files import logits, small, write_folder, write_gguf

from neuronrank_core.errors import NeuronRankError
from neuronrank_torch.model.open import load_model
from neuronrank_torch.pruning.result import LayerReport, ModuleReport
from neuronrank_torch.saving import model_writer as module

REPORT = {"ratio": 0.5, "method": "wanda"}


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def sharded(monkeypatch):
    """Every model counts as too large for one file."""
    monkeypatch.setattr(module, "SINGLE_FILE_BYTES", 0)


class TestFinish:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_loads_in_plain_transformers(self, tmp_path, family, tied):
        model = small(family, tied=tied)
        out = save_model(model, tiny_tokenizer(True), tmp_path / "new" / "er" / "out", report=REPORT)
        again = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(logits(again), logits(model))
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
        assert ("lm_head.weight" in load_file(out / "model.safetensors")) != tied
        assert transformers.AutoTokenizer.from_pretrained(out)("a")["input_ids"] == [BOS, 66]
        assert (out / "generation_config.json").is_file()
        assert names(out.parent) == ["out"]

    def test_saves_what_transformers_saves(self, tmp_path):
        model = small()
        model.save_pretrained(tmp_path / "theirs")
        ours = save_model(model, tiny_tokenizer(), tmp_path / "ours")
        for name, added in (("config.json", {"rope_theta": 10000.0}), ("generation_config.json", {})):
            theirs = json.loads((tmp_path / "theirs" / name).read_text())
            assert json.loads((ours / name).read_text()) == theirs | added
        expected, got = (load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", ours))
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        with safe_open(ours / "model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_dtype_is_kept(self, tmp_path):
        out = save_model(small().bfloat16(), tiny_tokenizer(), tmp_path / "out")
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
        assert load_model(str(out))[0].dtype == torch.bfloat16

    @pytest.mark.usefixtures("sharded")
    @pytest.mark.parametrize("tied", [True, False])
    def test_large_models_have_a_shard_a_layer(self, tmp_path, tied):
        model = small(tied=tied)
        out = save_model(model, tiny_tokenizer(), tmp_path / "out")
        index = json.loads((out / "model.safetensors.index.json").read_text())
        shards = {file.name: load_file(file) for file in out.glob("*.safetensors")}
        assert sorted(shards) == [f"model-0000{i}-of-0000{4 - tied}.safetensors" for i in range(1, 5 - tied)]
        assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
        assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in shards.values() for t in tensors.values())
        assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(out)), logits(model))

    def test_tensors_of_several_precisions_are_not_joined(self, tmp_path):
        model = small().bfloat16()
        model.model.norm.float()
        out = save_model(model, tiny_tokenizer(), tmp_path / "out")
        assert len(list(out.glob("model-*.safetensors"))) == 3

    def test_report_is_plain_sorted_json(self, tmp_path):
        out = save_model(small(), tiny_tokenizer(), tmp_path / "out", report={"b": "é", "a": [1]})
        text = (out / "neuronrank.json").read_text(encoding="utf-8")
        assert text == '{\n  "a": [\n    1\n  ],\n  "b": "é"\n}\n'

    def test_files_have_ordinary_permissions(self, tmp_path):
        out = save_model(small(), tiny_tokenizer(), tmp_path / "out")
        (tmp_path / "plain").touch()
        modes = {stat.S_IMODE(file.stat().st_mode) for file in [tmp_path / "plain", *out.iterdir()]}
        assert len(modes) == 1

    def test_everything_is_flushed_before_the_rename(self, tmp_path, monkeypatch):
        flushed = []
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(Path(f"/proc/self/fd/{fd}").readlink()), fsync(fd)))
        out = save_model(small(), tiny_tokenizer(), tmp_path / "out")
        last = flushed[-len(names(out)) - 2 :]
        assert {path.name for path in last[:-2]} == set(names(out))
        assert [path.name for path in last[-2:]] == ["model", tmp_path.name]

    def test_gguf_saves_as_an_ordinary_folder(self, tmp_path):
        (tmp_path / "gguf").mkdir()
        file = write_gguf(tmp_path / "gguf" / "tiny.gguf", small())
        model, tokenizer, _ = load_model(str(file))
        out = save_model(model, tokenizer, tmp_path / "out")
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        again = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(logits(again), logits(model))
        assert transformers.AutoTokenizer.from_pretrained(out)("hé")["input_ids"] == tokenizer("hé")["input_ids"]


class TestJournal:
    def test_a_finished_unit_is_there_the_next_time(self, tmp_path):
        model = small()
        report = LayerReport(1, {"up_proj": ModuleReport(10, 5), "down_proj": ModuleReport(10, 0, 3)}, 1.5)
        interrupted(model, tmp_path / "out", {0: None, 1: report})
        assert names(tmp_path) == [".out.partial"]
        with staging(model, tmp_path / "out") as stage:
            assert [stage.done(unit) for unit in (0, 1, "lm_head")] == [True, True, False]
            assert (stage.report(0), stage.report(1)) == (None, report)
        assert names(tmp_path) == []

    def test_a_shard_is_flushed_before_the_journal(self, tmp_path, monkeypatch):
        """Shard flushed, renamed, then journal flushed, renamed."""
        steps = []
        fsync, replace = os.fsync, Path.replace
        monkeypatch.setattr(
            os, "fsync", lambda fd: (steps.append(("flush", Path(f"/proc/self/fd/{fd}").readlink().name)), fsync(fd))
        )
        monkeypatch.setattr(Path, "replace", lambda self, to: (steps.append(("rename", to.name)), replace(self, to)))
        with staging(small(), tmp_path / "out") as stage, stage.resident(0):
            stage.keep(0)
        shard = "model-00002-of-00003.safetensors"
        folder = ("flush", ".out.partial")
        assert steps == [
            *[("flush", f"{shard}.tmp"), ("rename", shard), folder],
            *[("flush", "journal.json.tmp"), ("rename", "journal.json"), folder],
        ]

    @pytest.mark.parametrize("damage", ["gone", "short"])
    def test_a_damaged_shard_is_not_finished(self, tmp_path, damage):
        shard = interrupted(small(), tmp_path / "out", {0: None, 1: None}).shard(1)
        shard.unlink() if damage == "gone" else os.truncate(shard, 100)
        with staging(small(), tmp_path / "out") as stage:
            assert stage.units_done() == [0]

    def test_unfinished_files_of_a_killed_process_are_removed(self, tmp_path):
        folder = tmp_path / ".out.partial"
        (folder / "model").mkdir(parents=True)
        for name in ("model-00002-of-00003.safetensors", "model-00002-of-00003.safetensors.tmp", "hidden", "model/a"):
            (folder / name).write_text("junk")
        with staging(small(), tmp_path / "out") as stage:
            assert stage.units_done() == []
            assert names(folder) == ["lock", "model"]
            keep_all(stage)
            stage.complete(tiny_tokenizer())
            stage.finish({})
        assert names(tmp_path) == ["out"]
        assert "a" not in names(tmp_path / "out")

    def test_another_run_is_refused_or_discarded(self, tmp_path):
        one, other = ({"ratio": ratio, "file": {"a": [1, 2]}} for ratio in (0.5, 0.6))
        stage = interrupted(small(), tmp_path / "out", {0: None}, identity=one)
        before = names(stage.folder)
        with (
            pytest.raises(NeuronRankError, match=r"differs from this one: ratio was 0\.5, is 0\.6$") as caught,
            staging(small(), tmp_path / "out", other),
        ):
            pass
        assert "--force" in caught.value.hint
        assert names(stage.folder) == before
        with staging(small(), tmp_path / "out", other, force=True) as stage:
            assert stage.units_done() == []
        assert names(tmp_path) == []

    def test_force_resumes_the_same_run(self, tmp_path):
        interrupted(small(), tmp_path / "out", {0: None}, identity={"a": 1}, force=True)
        with staging(small(), tmp_path / "out", {"a": 1}, force=True) as stage:
            assert stage.units_done() == [0]

    def test_two_at_a_time_are_refused(self, tmp_path):
        with staging(small(), tmp_path / "out") as stage:
            with (
                pytest.raises(NeuronRankError, match="another run is writing to"),
                staging(small(), tmp_path / "out", force=True),
            ):
                pass
            keep_all(stage)
            stage.complete(tiny_tokenizer())
            stage.finish({})
        assert names(tmp_path) == ["out"]

    def test_hidden_states_on_disk_leave_no_file(self, tmp_path):
        with staging(small(), tmp_path / "out", hidden_states="disk") as stage:
            hidden = stage.room((2, 3, 4), torch.empty(0, dtype=torch.bfloat16))
            assert (hidden.shape, hidden.dtype) == ((2, 3, 4), torch.bfloat16)
            hidden.copy_(torch.arange(24).view(2, 3, 4))
            assert hidden.sum() == 276
            assert names(stage.folder) == ["lock", "model"]


class TestFails:
    @pytest.fixture(params=["shard", "tokenizer", "rust", "report", "rename"])
    def failing(self, request, monkeypatch):
        """A full disk, at one step after another; returns what lifts it."""

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        def full_in_rust(*_, **__):
            raise Exception("No space left on device (os error 28)")

        owner, name = {
            "shard": (module, "join_shards"),
            "tokenizer": (transformers.PreTrainedTokenizerBase, "save_pretrained"),
            "rust": (transformers.PreTrainedTokenizerBase, "save_pretrained"),
            "report": (Path, "write_text"),
            "rename": (Path, "rename"),
        }[request.param]

        def start():
            monkeypatch.setattr(owner, name, full_in_rust if request.param == "rust" else full)

        return start, monkeypatch.undo

    def fail(self, model, target, start):
        def run():
            with staging(model, target, force=True) as stage:
                keep_all(stage)
                start()
                stage.complete(tiny_tokenizer())
                stage.finish({})

        with pytest.raises(NeuronRankError, match=r"could not save to .*No space left") as caught:
            run()
        assert caught.value.exit_code == 1
        assert caught.value.__notes__ == ["2 of 2 layers are finished and saved: rerun the same command to resume"]

    def test_leaves_nothing_under_the_name_and_can_go_on(self, failing, tmp_path):
        start, stop = failing
        model = small()
        self.fail(model, tmp_path / "out", start)
        assert names(tmp_path) == [".out.partial"]
        stop()
        with staging(model, tmp_path / "out") as stage:
            assert stage.units_done() == [0, 1]
            stage.complete(tiny_tokenizer())
            stage.finish({})
        assert names(tmp_path) == ["out"]
        assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))

    def test_leaves_what_was_there(self, failing, tmp_path):
        folder = write_folder(tmp_path / "source")
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.fail(small(), folder, failing[0])
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        assert names(tmp_path) == [".source.partial", "source"]

    def test_without_a_finished_layer_nothing_is_left(self, tmp_path):
        with pytest.raises(KeyboardInterrupt) as caught, staging(small(), tmp_path / "out"):
            raise KeyboardInterrupt
        assert not hasattr(caught.value, "__notes__")
        assert names(tmp_path) == []

    @pytest.mark.parametrize("report", [{"x": float("nan")}, {"x": object()}])
    def test_report_that_is_not_json_saves_nothing(self, tmp_path, report):
        with pytest.raises((ValueError, TypeError)):
            save_model(small(), tiny_tokenizer(), tmp_path / "out", report=report)
        assert not (tmp_path / "out").exists()
