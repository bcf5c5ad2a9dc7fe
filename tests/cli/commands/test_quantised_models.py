"""Every command that reads a model reads a quantised one as the dense model that it stands for, and says so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from command import Run
from quantised import as_bfloat16, deepseek, edit, gpt_oss, llama, set_config, write_fp8, write_mxfp4
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from neuronrank_torch.model import open as opening

MODELS = {"llama": (llama(), (16, 24)), "qwen3": (llama(48, 80, "qwen3"), None), "experts": (deepseek(), (16, 24))}
Flags = list[object]
SAID = "weights of {} were dequantised to bfloat16; what is saved is not quantised"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def write_both(folder: Path, name: str) -> tuple[Path, Path]:
    """A quantised model, and a folder with the same numbers that is not."""
    config, block = MODELS[name]
    dense = write_fp8(folder / "quantised", config, block)
    shutil.copytree(folder / "quantised", folder / "dense")
    plain = {name: as_bfloat16(value) for name, value in dense.items()}

    def replace(tensors: dict[str, Tensor]) -> None:
        for name in dense:
            del tensors[f"{name}_scale_inv"]
        tensors |= plain

    edit(folder / "dense", replace)
    set_config(folder / "dense", quantization_config=None)
    return folder / "quantised", folder / "dense"


@pytest.fixture
def both(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    return write_both(tmp_path, getattr(request, "param", "llama"))


@pytest.fixture
def drawn(text: Path) -> Flags:
    return ["--dataset", text, "--nsamples", 4, "--seqlen", 32]


@pytest.mark.parametrize("both", MODELS, indirect=True)
def test_prune(run: Run, drawn: Flags, measured: Flags, both: tuple[Path, Path], tmp_path: Path) -> None:
    results = {}
    for model in both:
        out = tmp_path / f"{model.name}-pruned"
        done = run("prune", "--model", model, *drawn, *measured, "--save", out, "--json")
        results[model.name] = json.loads(done.stdout)
        said = f"the FP8 {SAID.format(model)}"
        assert (said in results[model.name]["notes"]) == (model.name == "quantised")
        assert (f"Warning: {said}\n" in done.stderr) == (model.name == "quantised")
    assert results["quantised"]["total"] == results["dense"]["total"]
    assert results["quantised"]["perplexity"] == results["dense"]["perplexity"]
    out = tmp_path / "quantised-pruned"
    saved, expected = tensors_of(out), tensors_of(tmp_path / "dense-pruned")
    assert saved.keys() == expected.keys() == tensors_of(both[1]).keys()
    for name, tensor in expected.items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name]), name
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert not hasattr(AutoModelForCausalLM.from_pretrained(out).config, "quantization_config")


def matrices(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices of an MLP that a tensor of the model holds: several if it holds gate and up, or experts."""
    experts = list(tensor) if tensor.ndim == 3 else [tensor]
    if not name.endswith("gate_up_proj"):
        return experts
    if name.endswith("bias") or tensor.shape[1] < tensor.shape[2]:  # (hidden, 2 * neurons): gate and up in turn.
        return [half for expert in experts for half in (expert[:, 0::2], expert[:, 1::2])]
    return [half for expert in experts for half in expert.chunk(2)]


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_experts(run: Run, drawn: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Mixtures as published, pruned a unit at a time, and what transformers makes of source and output."""
    source, out = tmp_path / "source", tmp_path / "out"
    if kind == "mxfp4":
        write_mxfp4(source, gpt_oss())
        set_config(source, dtype=None)  # As published.
        settings = Mxfp4Config(dequantize=True)
    else:
        write_fp8(source, deepseek(), (8, 4))  # Blocks that divide every matrix; transformers is wrong on others.
        settings = FineGrainedFP8Config(weight_block_size=(8, 4), dequantize=True)
    monkeypatch.setattr(opening, "_load_whole", lambda *_: pytest.fail("loaded whole"))
    done = run("prune", "--model", source, *drawn, "--sparsity_ratio", 0.625, "--save", out, "--json")
    said = f"the {kind.upper()} {SAID.format(source)}"
    assert said in json.loads(done.stdout)["notes"]
    assert f"Warning: {said}\n" in done.stderr
    names = {name.removesuffix("_blocks") for name in tensors_of(source)}
    assert tensors_of(out).keys() == {n for n in names if not n.endswith(("_scales", "_scale_inv"))}
    pruned, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=settings)
    expected, seen = theirs.state_dict(), 0
    for name, tensor in pruned.state_dict().items():
        kept = torch.ones_like(tensor, dtype=torch.bool)
        if re.search(r"\.mlp\..*_proj(\.weight)?$", name):
            kept = tensor != 0
            for matrix in matrices(name, tensor):
                seen += 1
                assert (matrix == 0).sum() == 0.625 * matrix.numel(), name
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor[kept], expected[name][kept]), name
    assert seen == (2 * 3 * 3 if kind == "mxfp4" else 3 + 3 * (4 + 1))


def test_prune_without_saving(run: Run, drawn: Flags, measured: Flags, both: tuple[Path, Path]) -> None:
    figures = [json.loads(run("prune", "--model", m, *drawn, *measured, "--json").stdout)["perplexity"] for m in both]
    assert figures[0] == figures[1]


def test_dry_run(run: Run, drawn: Flags, both: tuple[Path, Path]) -> None:
    plans = [json.loads(run("prune", "--model", m, *drawn, "--dry-run", "--json").stdout) for m in both]
    assert [plan["notes"] for plan in plans] == [[f"the FP8 {SAID.format(both[0])}"], []]
    assert plans[0]["plan"]["memory"] == plans[1]["plan"]["memory"]


def test_collect(run: Run, drawn: Flags, both: tuple[Path, Path], tmp_path: Path) -> None:
    for model in both:
        done = run("collect", "--model", model, *drawn, "--save", tmp_path / f"{model.name}-statistics", "--json")
        notes = [f"the FP8 {SAID.format(model)}"] if model.name == "quantised" else []
        assert json.loads(done.stdout)["notes"] == notes
    tables = [{file.name: load_file(file) for file in tmp_path.glob(f"{m.name}-stat*/*.safetensors")} for m in both]
    assert len(tables[0]) == 3  # The layers and the head.
    assert tables[0].keys() == tables[1].keys()
    for name, table in tables[1].items():
        same = {
            what: column.numpy().tobytes() == tables[0][name][what].numpy().tobytes() for what, column in table.items()
        }
        assert all(same.values())


def test_compare(run: Run, text: Path, both: tuple[Path, Path]) -> None:
    done = run("compare", *both, "--eval", "--eval-dataset", text, "--eval-windows", 2, "--json")
    result = json.loads(done.stdout)
    assert result["notes"] == [f"the FP8 {SAID.format(both[0])}"]
    quantised, dense = result["models"]
    for figure in ("perplexity", "parameters", "nonzero"):
        assert quantised[figure] == dense[figure]


def test_report(run: Run, drawn: Flags, both: tuple[Path, Path], tmp_path: Path) -> None:
    run("prune", "--model", both[0], *drawn, "--save", tmp_path / "out")
    run("report", tmp_path / "out", "--save", tmp_path / "page.html")
    assert SAID.format(both[0]) in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_eval(run: Run, text: Path, tmp_path: Path, kind: str) -> None:
    """The same perplexity as a folder that transformers writes from the model that it dequantised."""
    model, plain = tmp_path / "model", tmp_path / "plain"
    if kind == "fp8":
        model, plain = write_both(tmp_path, "llama")
    else:
        dense = write_mxfp4(model, gpt_oss())
        shutil.copytree(model, plain)

        def replace(tensors: dict[str, Tensor]) -> None:
            for name, value in dense.items():
                del tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
                tensors[name] = as_bfloat16(value)

        edit(plain, replace)
        set_config(plain, quantization_config=None)
    flags = ["--dataset", text, "--seqlen", 32, "--windows", 2, "--json"]
    done = run("eval", "--model", model, *flags)
    figures, expected = (json.loads(r.stdout) for r in (done, run("eval", "--model", plain, *flags)))
    assert figures["perplexity"] == expected["perplexity"]
    assert (figures["notes"], expected["notes"]) == ([f"the {kind.upper()} {SAID.format(model)}"], [])


def test_tune_and_verify(run: Run, drawn: Flags, text: Path, tmp_path: Path) -> None:
    quantised, _ = write_both(tmp_path, "llama")
    run("collect", "--model", quantised, *drawn, "--save", tmp_path / "stats")
    searched = ["--model", quantised, "--stats", tmp_path / "stats", "--eval-dataset", text, "--eval-windows", 1]
    one = ["--prune_method", "wanda", "--trials", 1, "--save", tmp_path / "best.toml"]
    for command in (["tune", *searched, *one], ["verify", "--model", quantised, *drawn, "--layers", 1]):
        result = run(*command, "--json")
        assert f"the FP8 {SAID.format(quantised)}" in json.loads(result.stdout)["notes"]
        assert f"Warning: the FP8 {SAID.format(quantised)}" in " ".join(result.stderr.split())


def test_damaged(run: Run, drawn: Flags, both: tuple[Path, Path], tmp_path: Path) -> None:
    edit(both[0], lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight_scale_inv"))
    before = sorted(tmp_path.rglob("*"))
    done = run("prune", "--model", both[0], *drawn, "--save", tmp_path / "out", code=2)
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith(f"Error: {both[0]}: model.layers.1.mlp.down_proj.weight ")
    assert error.endswith("model.layers.1.mlp.down_proj.weight_scale_inv is missing")
    assert hint == "Hint: download it again, or prune the unquantised original"
    assert sorted(tmp_path.rglob("*")) == before


def test_other_format(run: Run, drawn: Flags, both: tuple[Path, Path], tmp_path: Path) -> None:
    set_config(both[0], quantization_config={"quant_method": "compressed-tensors"})
    done = run("prune", "--model", both[0], *drawn, "--save", tmp_path / "out", code=2)
    error, hint = done.stderr.splitlines()[-2:]
    assert error == f"Error: {both[0]} contains quantised weights (compressed-tensors)"
    assert hint.startswith("Hint: prune the unquantised original; or ")
    assert not (tmp_path / "out").exists()
