"""The output folder: what may be overwritten, and what never is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers
from filelock import Timeout
from staged import save_model
from tiny import tiny_tokenizer
from tiny_files import logits, small

from neuronrank_core.errors import InputError
from neuronrank_torch.files.durable import check_output, lock_beside, write_durably
from neuronrank_torch.model.open import load_model


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_force_replaces_a_model(folder):
    (folder / "notes.txt").touch()
    model = small(seed=1)
    save_model(model, tiny_tokenizer(), folder, force=True)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    assert not (folder / "notes.txt").exists()
    assert names(folder.parent) == ["source"]


def test_force_fills_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    assert (save_model(small(), tiny_tokenizer(), tmp_path / "out", force=True) / "config.json").exists()


def test_link_is_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert check_output(tmp_path / "link", force=True) == folder


def test_a_link_to_a_file_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "cells.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(file)
    for text in ("one", "two"):
        write_durably(link, lambda path, text=text: path.write_text(text))
        assert (file.read_text(), link.is_symlink()) == (text, True)
    with lock_beside(link), pytest.raises(Timeout):
        lock_beside(file).acquire(timeout=0)
    assert names(tmp_path) == ["elsewhere", "link.jsonl"]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_existing_needs_force(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(InputError, match=r"already exists|is a file"):
        check_output(tmp_path / "out")


def test_file_is_never_replaced(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="is a file"):
        check_output(tmp_path / "out", force=True)


@pytest.mark.parametrize(
    "content",
    [["notes.txt"], ["config.json"], ["model.safetensors"], ["config.json", "model.safetensors", "work/a"]],
    ids=str,
)
def test_other_folder_is_never_deleted(tmp_path, content):
    for name in content:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()
    with pytest.raises(InputError, match="is not a saved model"):
        save_model(small(), tiny_tokenizer(), tmp_path / "out", force=True)
    assert all((tmp_path / "out" / name).exists() for name in content)


@pytest.mark.parametrize("where", ["source", ".", "link", "source/../source"])
@pytest.mark.parametrize("force", [False, True])
def test_source_is_never_replaced(folder, where, force):
    (folder.parent / "link").symlink_to(folder)
    source = load_model(str(folder))[2]
    with pytest.raises(InputError, match="contains the input model"):
        check_output(folder.parent / where, force, source=source.path, label=source.spec)


def test_folder_of_a_gguf_source_is_never_replaced(gguf_file):
    source = load_model(str(gguf_file))[2]
    with pytest.raises(InputError, match="contains the input model"):
        check_output(gguf_file.parent, force=True, source=source.path, label=source.spec)


def test_beside_the_source_is_fine(folder):
    source = load_model(str(folder))[2]
    assert check_output(folder.parent / "source2", source=source.path, label=source.spec) == folder.parent / "source2"


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is not a folder"):
        check_output(tmp_path / "file" / "out")


def test_parent_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path} is not writable"):
        check_output(tmp_path / "new" / "out")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def fails(path):
        path.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_durably(tmp_path / "file", fails)
    assert names(tmp_path) == []
