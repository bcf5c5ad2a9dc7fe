"""A loaded model equals that of plain transformers; a broken checkpoint gives an error of one line."""

from __future__ import annotations

import json
import os

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tiny_files import logits, small, write_folder
from transformers import modeling_gguf_pytorch_utils

from neuronrank_core.errors import InputError
from neuronrank_torch.model.open import load_model, open_model


@pytest.fixture
def sharded(tmp_path):
    path = write_folder(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


class TestLoad:
    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
    def test_folder(self, tmp_path, family):
        original = small(family)
        original.train().save_pretrained(tmp_path)
        tiny_tokenizer(True).save_pretrained(tmp_path)
        model, tokenizer, source = load_model(str(tmp_path))
        assert torch.equal(logits(model), logits(original.eval()))
        assert not model.training
        assert tokenizer("a")["input_ids"] == tiny_tokenizer(True)("a")["input_ids"]
        assert (source.kind, source.path) == ("folder", tmp_path)
        assert source.model_type == original.config.model_type

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("dtype", "expected"), [("auto", None), ("float16", torch.float16)])
    def test_dtype(self, tmp_path, stored, dtype, expected):
        small().to(stored).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        model, _, _ = load_model(str(tmp_path), dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected or stored}

    def test_relative_path_becomes_absolute(self, folder, monkeypatch):
        monkeypatch.chdir(folder.parent)
        assert load_model("source")[2].path == folder

    def test_nothing_is_printed_and_settings_are_restored(self, folder, gguf_file, capfd):
        log = transformers.utils.logging
        log.enable_progress_bar()
        log.set_verbosity_info()
        try:
            load_model(str(folder))
            load_model(str(gguf_file))
            assert (log.get_verbosity(), log.is_progress_bar_enabled()) == (log.INFO, True)
            assert capfd.readouterr() == ("", "")
        finally:
            log.set_verbosity_warning()


class TestGguf:
    def test_equals_the_model_it_was_written_from(self, gguf_file):
        model, tokenizer, source = load_model(str(gguf_file))
        assert torch.allclose(logits(model), logits(small()), atol=1e-5)
        assert tokenizer("hé", add_special_tokens=False)["input_ids"] == tiny_tokenizer()("hé")["input_ids"]
        assert (source.kind, source.path) == ("gguf", gguf_file)
        assert model.dtype == torch.float32
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_dtype(self, gguf_file):
        assert load_model(str(gguf_file), dtype="bfloat16")[0].dtype == torch.bfloat16

    @pytest.mark.parametrize("read", [load_model, open_model])
    def test_file_is_parsed_once_and_readers_are_put_back(self, gguf_file, monkeypatch, read):
        parsed = []

        class Counting(gguf.GGUFReader):
            def __init__(self, path, *rest):
                parsed.append(path)
                super().__init__(path, *rest)

        monkeypatch.setattr(gguf, "GGUFReader", Counting)
        names, load = gguf.get_tensor_name_map, modeling_gguf_pytorch_utils.load_gguf_checkpoint
        read(str(gguf_file))
        assert len(parsed) == 1
        assert modeling_gguf_pytorch_utils.load_gguf_checkpoint is load
        assert gguf.GGUFReader is Counting
        assert gguf.get_tensor_name_map is names

    @pytest.mark.parametrize("read", [load_model, open_model])
    @pytest.mark.parametrize("keep", [6, 200, 40_000])
    def test_truncated(self, gguf_file, keep, read):
        gguf_file.write_bytes(gguf_file.read_bytes()[:keep])
        with pytest.raises(InputError, match=r"cannot load .*tiny\.gguf: ") as caught:
            read(str(gguf_file))
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is not None

    @pytest.mark.parametrize("content", [b"", b"GGU", b"not a model"])
    def test_other_file(self, tmp_path, content):
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(InputError, match="is a file, but not a GGUF file"):
            load_model(str(tmp_path / "a.gguf"))


def _edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def _drop(folder, key):
    weights = load_file(folder / "model.safetensors")
    del weights[key]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


#: What is done to a good folder, and what the message must say.
DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config cut": (lambda d: (d / "config.json").write_text('{"a": '), r"cannot read .*config.json"),
    "config list": (lambda d: (d / "config.json").write_text("[]"), r"cannot read .*config.json: not a JSON object"),
    "config of nothing": (lambda d: (d / "config.json").write_text("{}"), "cannot load "),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "pickle": (_pickle, "has its weights in pickle files"),
    "weights cut": (lambda d: os.truncate(d / "model.safetensors", 5000), r"model.safetensors is truncated or corrupt"),
    "weights empty": (lambda d: os.truncate(d / "model.safetensors", 0), r"model.safetensors is truncated or corrupt"),
    "key gone": (lambda d: _drop(d, "model.layers.1.mlp.up_proj.weight"), r"lacks model.layers.1.mlp.up_proj.weight$"),
    "layers gone": (
        lambda d: _edit(d / "config.json", num_hidden_layers=3),
        r"lacks model.layers.2.* and 8 more weights",
    ),
    "other size": (
        lambda d: _edit(d / "config.json", intermediate_size=65),
        "does not match its config.json in model.layers.0.mlp.down_proj.weight and 5 more",
    ),
    "quantised": (
        lambda d: _edit(d / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "contains quantised weights",
    ),
    "own code": (
        lambda d: _edit(d / "config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "code.Model"}),
        "cannot load |has no usable tokenizer",
    ),
    "no tokenizer": (lambda d: [file.unlink() for file in d.glob("tokenizer*")], "has no usable tokenizer"),
    "tokenizer cut": (lambda d: (d / "tokenizer.json").write_text("{"), "has no usable tokenizer"),
}


class TestBadInput:
    def test_report_of_transformers_is_not_logged(self, folder, caplog):
        logger = transformers.utils.logging.get_logger("transformers")
        logger.addHandler(caplog.handler)
        try:
            _drop(folder, "model.layers.1.mlp.up_proj.weight")
            transformers.AutoModelForCausalLM.from_pretrained(folder)
            assert caplog.records, "transformers no longer reports: this test shows nothing"
            caplog.clear()
            with pytest.raises(InputError):
                load_model(str(folder))
            assert caplog.records == []
        finally:
            logger.removeHandler(caplog.handler)

    @pytest.mark.parametrize("read", [load_model, open_model])
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_damaged_folder(self, folder, damage, read, capfd):
        act, message = DAMAGE[damage]
        act(folder)
        with pytest.raises(InputError, match=message) as caught:
            read(str(folder))
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.hint
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", 3])
    def test_index_that_points_outside(self, sharded, name):
        index = sharded / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["lm_head.weight"] = name
        index.write_text(json.dumps(content))
        for read in (load_model, open_model):
            with pytest.raises(InputError, match=f"refers to a file outside its folder: {name}"):
                read(str(sharded))

    def test_shard_is_missing(self, sharded):
        shard = sorted(sharded.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(InputError, match=f"{shard.name} is missing"):
            load_model(str(sharded))

    def test_shard_is_cut(self, sharded):
        shard = sorted(sharded.glob("*.safetensors"))[1]
        os.truncate(shard, shard.stat().st_size - 1)
        with pytest.raises(InputError, match=f"{shard.name} is truncated"):
            load_model(str(sharded))

    def test_empty_folder(self, tmp_path):
        with pytest.raises(InputError, match="is empty"):
            load_model(str(tmp_path))

    def test_folder_of_a_gguf_file(self, gguf_file):
        with pytest.raises(InputError, match=r"has no config\.json") as caught:
            load_model(str(gguf_file.parent))
        assert str(gguf_file) in caught.value.hint

    def test_unknown_dtype(self, folder):
        with pytest.raises(InputError, match="dtype is 'int8'"):
            load_model(str(folder), dtype="int8")

    @pytest.mark.parametrize("device", ["cuda:99", "warp", "meta"])
    def test_device_is_checked_before_the_model_is_read(self, device):
        with pytest.raises(InputError, match=f"device {device} is not available"):
            load_model("/no/such", device=device)
