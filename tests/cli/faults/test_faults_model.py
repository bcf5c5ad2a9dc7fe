"""Rows of docs/faults.md: models that are not there, broken, hostile, or not made for this."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Run
from faults import copied, refused, saved
from safetensors.torch import load_file, save_file
from tiny_files import small as small_model
from tiny_files import write_gguf, write_model
from transformers import MambaConfig, MambaForCausalLM

from neuronrank_torch.model import open as models

Flags = list[object]
COMMANDS = ("prune", "eval", "verify")


def command(name: str, model: object, small: Flags) -> Flags:
    """A command on a model: ``prune`` streamed from disk, the others in memory where they can."""
    text = small[3]
    return {
        "prune": ["prune", *small, "--model", model, "--save", "out"],
        "prune in memory": ["prune", *small, "--model", model, "--eval", "--eval-dataset", text],
        "dry run": ["prune", *small, "--model", model, "--dry-run"],
        "eval": ["eval", "--model", model, "--dataset", text, "--seqlen", 32, "--windows", 1],
        "verify": ["verify", "--model", model, "--dataset", text, "--nsamples", 2, "--seqlen", 32],
    }[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_folder_missing(run: Run, small: Flags, name: str) -> None:
    refused(run, *command(name, "./gone", small), code=2, says="model not found: ./gone", hint="path")


@pytest.mark.parametrize("name", COMMANDS)
def test_folder_empty(run: Run, small: Flags, name: str) -> None:
    Path("source").mkdir()
    refused(run, *command(name, "source", small), code=2, says="source is empty", hint="model folder")


@pytest.mark.parametrize("name", COMMANDS)
def test_without_tokenizer(run: Run, small: Flags, model: Path, name: str) -> None:
    for file in copied(model).glob("tokenizer*"):
        file.unlink()
    refused(run, *command(name, "source", small), code=2, says="has no usable tokenizer", hint="tokenizer.json")


@pytest.mark.parametrize("name", ["prune", "prune in memory", "dry run", "verify"])
def test_without_a_known_mlp(run: Run, small: Flags, name: str) -> None:
    config = MambaConfig(
        num_hidden_layers=2, hidden_size=16, state_size=4, vocab_size=258, bos_token_id=0, eos_token_id=1
    )
    write_model("source", MambaForCausalLM(config))
    says = "No TF-IDF statistics for layer 0: MambaForCausalLM is not supported: it has no decoder layers with MLPs"
    error = refused(run, *command(name, "source", small), code=2, says=says, hint="layer.mlp.gate_proj")
    assert "perplexity before" not in error


def _shard(folder: Path) -> Path:
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards[1]


def _point(index: Path, name: object) -> None:
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))


def _index(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def _scramble(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)


SHARDS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda d: _shard(d).unlink(), "is missing, but the index refers to it", "download"),
    "truncated": (lambda d: os.truncate(_shard(d), _shard(d).stat().st_size - 1), "truncated or corrupt", "download"),
    "empty": (lambda d: os.truncate(_shard(d), 0), "truncated or corrupt", "download"),
    "corrupt": (lambda d: _scramble(_shard(d)), "truncated or corrupt", "download"),
    "index cut": (lambda d: os.truncate(_index(d), 30), "cannot read ", "download"),
    "index is a list": (lambda d: _index(d).write_text("[]"), "not a JSON object", "download"),
    "index without map": (lambda d: _index(d).write_text("{}"), "lists no weights", "download"),
    "map is a list": (lambda d: _index(d).write_text('{"weight_map": [1]}'), "lists no weights", "download"),
    "outside": (lambda d: _point(_index(d), "../secret.safetensors"), "refers to a file outside its folder", "trust"),
    "absolute": (lambda d: _point(_index(d), "/etc/passwd"), "refers to a file outside its folder", "trust"),
    "no name": (lambda d: _point(_index(d), None), "refers to a file outside its folder", "trust"),
    "dots": (lambda d: _point(_index(d), ".."), "refers to a file outside its folder", "trust"),
}


@pytest.mark.parametrize("name", ["prune", "prune in memory"])
@pytest.mark.parametrize("damage", SHARDS)
def test_shards(run: Run, small: Flags, name: str, damage: str) -> None:
    folder = saved(Path("source"))
    shutil.copy(_shard(folder), "secret.safetensors")
    act, says, hint = SHARDS[damage]
    act(folder)
    refused(run, *command(name, "source", small), code=2, says=says, hint=hint)


@pytest.mark.parametrize("name", ["prune", "eval", "prune in memory"])
@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 10**9), ("vocab_size", 10**12), ("hidden_size", 4096)]
)
def test_config_of_a_far_larger_model(
    run: Run, small: Flags, model: Path, name: str, key: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of its size is built, which would take hours or all memory."""
    config = copied(model) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    monkeypatch.setattr(models, "init_empty_weights", lambda **_: pytest.fail("built"))
    if key == "num_hidden_layers":
        monkeypatch.setattr(models, "_load_tokenizer", lambda *_: pytest.fail("listed"))
    refused(run, *command(name, "source", small), code=2, says="source describes a model of ", hint="config.json")


@pytest.mark.parametrize("name", ["prune", "eval"])
@pytest.mark.parametrize("keep", [0, 6, 200, 40_000, 60_000])
def test_gguf(run: Run, small: Flags, name: str, keep: int) -> None:
    write_gguf(Path("tiny.gguf"), small_model())
    os.truncate("tiny.gguf", keep)
    says = "cannot load tiny.gguf: " if keep else "tiny.gguf is a file, but not a GGUF file"
    refused(run, *command(name, "tiny.gguf", small), code=2, says=says, hint="model")


@pytest.mark.parametrize("name", COMMANDS)
def test_pickle_only(run: Run, small: Flags, model: Path, name: str) -> None:
    folder = copied(model)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    says = "has its weights in pickle files, which can run code"
    refused(run, *command(name, "source", small), code=2, says=says, hint="safetensors")


CODE = """
import pathlib
pathlib.Path({trace!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "mine"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("name", [*COMMANDS, "prune in memory", "dry run"])
@pytest.mark.parametrize("known", [False, True], ids=["its own type", "a known type"])
def test_code_of_its_own_is_never_run(run: Run, small: Flags, model: Path, name: str, known: bool) -> None:
    folder, trace = copied(model), Path.cwd() / "trace"
    (folder / "code.py").write_text(CODE.format(trace=str(trace)))
    maps = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoModel": "code.Model"}
    for file, extra in (("config.json", maps), ("tokenizer_config.json", {"AutoTokenizer": ["code.Tokenizer", None]})):
        content = json.loads((folder / file).read_text()) | {"auto_map": extra}
        (folder / file).write_text(json.dumps(content if known else content | {"model_type": "mine"}))
    if known:  # transformers has a class of its own for it, and takes that.
        run(*command(name, "source", small))
    else:
        refused(run, *command(name, "source", small), code=2, says="source", hint="")
    assert not trace.exists()


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "neuronrank_wanda"])
def test_a_weight_that_is_no_number(run: Run, small: Flags, model: Path, value: float, method: str) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][3, 5] = value

    _weights(copied(model), change)
    flags = [*command("prune", "source", small), "--prune_method", method]
    refused(run, *flags, code=1, says="NaN or Inf in", hint="check the")


@pytest.mark.parametrize("name", ["prune", "prune in memory", "eval", "verify"])
@pytest.mark.parametrize("where", ["model.embed_tokens", "model.layers.0.post_attention_layernorm"])
def test_an_activation_that_is_no_number(run: Run, small: Flags, model: Path, name: str, where: str) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[f"{where}.weight"].fill_(1e38 if "norm" in where else float("nan"))

    _weights(copied(model), change)
    says = "not finite" if name == "eval" else "NaN or Inf in"
    refused(run, *command(name, "source", small), code=1, says=says, hint="--dtype float32")
