"""Quantised checkpoints are read as the numbers that they stand for, whole or one unit at a time, or refused."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantised import (
    Array,
    as_bfloat16,
    deepseek,
    edit,
    gpt_oss,
    llama,
    set_config,
    write_fp8,
    write_mxfp4,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from neuronrank_core.errors import InputError
from neuronrank_torch.model.open import load_model, open_model
from neuronrank_torch.model.quantised import Fp8Weights, Mxfp4Weights
from neuronrank_torch.model.weights import LoadedWeights, SafetensorsWeights

#: How to write each, by name. Blocks are cut off at the ends of rows and columns; by 16 x 24, the number of blocks
#: divides some sizes that the block does not.
FP8: dict[str, Any] = {
    "16 x 24": lambda path: write_fp8(path, llama(), (16, 24)),
    "128 x 128": lambda path: write_fp8(path, llama(144, 272, "qwen3"), (128, 128)),
    "one scale": lambda path: write_fp8(path, llama(), None),
    "experts": lambda path: write_fp8(path, deepseek(), (16, 24)),
}
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def streamed_state(path: Path, **options: Any) -> dict[str, Tensor]:
    """Every tensor of a model that is read one unit at a time."""
    streamed, _, _ = open_model(str(path), **options)
    assert not isinstance(streamed.source, LoadedWeights), "loaded whole"
    state = {}
    for unit in streamed.units:
        with streamed.resident(unit):
            state |= {name: tensor.clone() for name, tensor in streamed.tensors(unit).items()}
    return state


def whole_state(path: Path, **options: Any) -> dict[str, Tensor]:
    return load_model(str(path), **options)[0].state_dict()


def held(state: dict[str, Tensor], name: str) -> Tensor:
    """What a model has under a name of the checkpoint."""
    if name in state:
        return state[name]
    match = EXPERT.fullmatch(name)
    assert match is not None, name
    if match[3] == "down":
        return state[f"{match[1]}.down_proj"][int(match[2])]
    gate, up = state[f"{match[1]}.gate_up_proj"][int(match[2])].chunk(2)
    return gate if match[3] == "gate" else up


def check(state: dict[str, Tensor], dense: dict[str, Array], path: Path) -> None:
    """Quantised tensors have the values decoded in NumPy, and all others those in the file."""
    assert len(dense) >= 4
    for name, value in dense.items():
        assert torch.equal(held(state, name), as_bfloat16(value)), name
    stored = load_file(path / "model.safetensors")
    others = [name for name in stored if not re.search("_proj.*weight|_proj_(blocks|scales)", name)]
    assert len(others) >= 4
    for name in others:
        assert torch.equal(state[name], stored[name].to(state[name].dtype)), name


@pytest.mark.parametrize("read", [whole_state, streamed_state])
@pytest.mark.parametrize("kind", FP8)
def test_fp8(tmp_path, kind, read):
    dense = FP8[kind](tmp_path)
    check(read(tmp_path), dense, tmp_path)


@pytest.mark.parametrize("kind", FP8)
def test_streamed_equals_whole(tmp_path, kind):
    FP8[kind](tmp_path)
    whole, streamed = whole_state(tmp_path), streamed_state(tmp_path)
    assert whole.keys() == streamed.keys()
    for name, tensor in whole.items():
        assert (tensor.dtype, tensor.shape) == (streamed[name].dtype, streamed[name].shape), name
        assert torch.equal(tensor, streamed[name]), name
    kept = {name for name, tensor in whole.items() if tensor.dtype == torch.float32}
    assert kept == ({"model.layers.1.mlp.gate.e_score_correction_bias"} if kind == "experts" else set())


def test_equals_transformers_where_no_block_is_cut_off(tmp_path):
    write_fp8(tmp_path, llama(48, 96), (8, 24))
    settings = transformers.FineGrainedFP8Config(weight_block_size=(8, 24), dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings).state_dict()
    for name, tensor in whole_state(tmp_path).items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("read", [whole_state, streamed_state])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_precision(tmp_path, scales, read):
    """A product of a weight and a scale is rounded once, to the precision that is asked for."""
    dense = write_fp8(tmp_path, llama(), (16, 24))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: (t / 3).to(scales) for name, t in tensors.items() if name.endswith("_scale_inv")}

    edit(tmp_path, change)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    at = torch.arange(dense[name].shape[0]) // 16, torch.arange(dense[name].shape[1]) // 24
    product = stored[name].float() * stored[f"{name}_scale_inv"].float()[at[0]][:, at[1]]
    assert not torch.equal(product.bfloat16().float(), product)
    assert torch.equal(read(tmp_path, dtype="float32")[name], product)
    assert torch.equal(read(tmp_path, dtype="float16")[name], product.half())
    assert torch.equal(read(tmp_path)[name], product.bfloat16())
    set_config(tmp_path, dtype=None)  # As in some published configurations.
    assert torch.equal(read(tmp_path)[name], product.bfloat16())


def test_layers_are_dequantised_while_they_are_used(tmp_path, monkeypatch):
    write_fp8(tmp_path, llama(), (16, 24))
    shapes = []
    dequantise = Fp8Weights.dequantise
    monkeypatch.setattr(
        Fp8Weights, "dequantise", lambda self, w, s: shapes.append(tuple(w.shape)) or dequantise(self, w, s)
    )
    streamed, _, _ = open_model(str(tmp_path))
    assert shapes == []
    with streamed.resident(1):
        assert sorted(shapes) == sorted([(40, 40), (20, 40), (20, 40), (40, 40), (56, 40), (56, 40), (40, 56)])
        assert streamed.model.model.layers[0].mlp.up_proj.weight.is_meta
    assert streamed.model.model.layers[1].mlp.up_proj.weight.is_meta


def test_scales_as_exponents(tmp_path):
    """Powers of two, stored as 8-bit exponents."""
    write_fp8(tmp_path, llama(), (16, 24))

    def convert(dtype: torch.dtype) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            tensors |= {n: t.log2().round().exp2().to(dtype) for n, t in tensors.items() if n.endswith("_scale_inv")}

        edit(tmp_path, change)

    convert(torch.float32)
    expected = whole_state(tmp_path)
    convert(torch.float8_e8m0fnu)
    found = streamed_state(tmp_path)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_fp8_of_all_experts_in_one_tensor(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight, scales = (
        torch.randn(3, 5, 7, generator=generator).to(torch.float8_e4m3fn),
        torch.rand(3, 3, 3, generator=generator),
    )
    save_file({"experts": weight, "experts_scale_inv": scales}, tmp_path / "model.safetensors")
    stored = SafetensorsWeights([tmp_path / "model.safetensors"])
    read = Fp8Weights(tmp_path, stored, {"quant_method": "fp8", "weight_block_size": [2, 3]}, torch.float32)
    found = read.tensor("experts")
    assert read.shapes() == {"experts": (3, 5, 7)}
    for e, row, column in itertools.product(range(3), range(5), range(7)):
        assert found[e, row, column] == weight[e, row, column].float() * scales[e, row // 2, column // 3]


class TestMxfp4:
    def test_whole(self, tmp_path):
        dense = write_mxfp4(tmp_path, gpt_oss())
        set_config(tmp_path, dtype=None)  # As published.
        check(whole_state(tmp_path), dense, tmp_path)

    def test_equals_transformers(self, tmp_path):
        write_mxfp4(tmp_path, gpt_oss(96, 64))
        settings = transformers.Mxfp4Config(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
        theirs = model.state_dict()
        for name, tensor in whole_state(tmp_path).items():
            assert torch.equal(tensor, theirs[name]), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_one_tensor_at_a_time(self, tmp_path, dtype):
        dense = write_mxfp4(tmp_path, gpt_oss())
        stored = SafetensorsWeights([tmp_path / "model.safetensors"])
        weights = Mxfp4Weights(tmp_path, stored, {"quant_method": "mxfp4"}, dtype)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(gpt_oss())
        assert weights.fit(model)
        for name in weights.shapes():
            tensor = weights.tensor(name)
            assert tuple(tensor.shape) == weights.shapes()[name]
            if name in dense:
                assert torch.equal(tensor, as_bfloat16(dense[name]).to(dtype))
        weights.prefetch(weights.shapes())


def test_configuration_is_that_of_an_unquantised_model(tmp_path):
    write_fp8(tmp_path, llama(), (16, 24))
    transformers.GenerationConfig(do_sample=True, top_k=7).save_pretrained(tmp_path)
    for read in (load_model, open_model):
        opened, _, source = read(str(tmp_path))
        model = getattr(opened, "model", opened) if read is open_model else opened
        assert not hasattr(model.config, "quantization_config")
        assert (model.dtype, model.generation_config.top_k, model.training) == (torch.bfloat16, 7, False)
        note = f"the FP8 weights of {tmp_path} were dequantised to bfloat16; what is saved is not quantised"
        assert source.notes == (note,)


def test_nothing_is_said_of_other_models(folder):
    assert load_model(str(folder))[2].notes == open_model(str(folder))[2].notes == ()


def _set(name: str, change: Any) -> Any:
    return lambda path: edit(path, lambda tensors: tensors.update({name: change(tensors[name])}))


def _drop(*names: str) -> Any:
    return lambda path: edit(path, lambda tensors: [tensors.pop(name) for name in names])


UP = "model.layers.0.mlp.up_proj.weight"
BLOCKS, SCALES = (f"model.layers.1.mlp.experts.down_proj_{part}" for part in ("blocks", "scales"))
#: What is done to a quantised folder, and what the message says.
FP8_DAMAGE = {
    "no scales": (_drop(f"{UP}_scale_inv"), rf"{UP} .* {UP}_scale_inv is missing$"),
    "no weight": (_drop(UP), rf"{UP} is missing$"),
    "not quantised": (_set(UP, lambda t: t.bfloat16()), rf"{UP} is stored as BF16$"),
    "scales of another type": (_set(f"{UP}_scale_inv", lambda t: t.byte()), rf"{UP}_scale_inv is stored as U8$"),
    "too few scales": (
        _set(f"{UP}_scale_inv", lambda t: t[:-1].clone()),
        rf"{UP}_scale_inv of shape \[3, 2\] does not fit {UP} of shape \[56, 40\]$",
    ),
    "another block": (
        lambda path: set_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 24]}),
        r"_scale_inv of shape \[\d, \d\] does not fit ",
    ),
    "one scale expected": (
        lambda path: set_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": None}),
        r"_scale_inv of shape \[\d, \d\] does not fit ",
    ),
    "a vector": (_set(UP, lambda t: t[0].clone()), r"does not fit .* of shape \[40\]$"),
    "bad block": (
        lambda path: set_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": [0, 24]}),
        "cannot load .*weight_block_size",
    ),
    "weight and scales gone": (_drop(UP, f"{UP}_scale_inv"), rf"lacks {UP}$"),
}
MXFP4_DAMAGE = {
    "no scales": (_drop(SCALES), rf"{SCALES} is missing$"),
    "no blocks": (_drop(BLOCKS), rf"{BLOCKS} is missing$"),
    "blocks of another type": (_set(BLOCKS, lambda t: t.int()), rf"{BLOCKS} is stored as I32$"),
    "too few scales": (
        _set(SCALES, lambda t: t[..., :-1].clone()),
        r"_scales of shape \[3, 64, 2\] does not fit .*_blocks of shape \[3, 64, 3, 16\]$",
    ),
    "blocks of another size": (_set(BLOCKS, lambda t: t[..., :-1].clone()), "does not fit"),
}


@pytest.mark.parametrize("read", [load_model, open_model])
class TestRefused:
    def refused(self, path: Path, read: Any, message: str, capfd: Any) -> str:
        with pytest.raises(InputError, match=message) as caught:
            read(str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert capfd.readouterr() == ("", "")
        return caught.value.hint or ""

    @pytest.mark.parametrize("damage", FP8_DAMAGE)
    def test_damaged_fp8(self, tmp_path, damage, read, capfd):
        write_fp8(tmp_path, llama(), (16, 24))
        act, message = FP8_DAMAGE[damage]
        act(tmp_path)
        capfd.readouterr()
        assert self.refused(tmp_path, read, message, capfd)

    @pytest.mark.parametrize("damage", MXFP4_DAMAGE)
    def test_damaged_mxfp4(self, tmp_path, damage, read, capfd):
        write_mxfp4(tmp_path, gpt_oss())
        act, message = MXFP4_DAMAGE[damage]
        act(tmp_path)
        capfd.readouterr()
        assert self.refused(tmp_path, read, message, capfd)

    @pytest.mark.parametrize(
        ("settings", "method"),
        [
            ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
            ({"load_in_8bit": True}, "an unnamed method"),
            ({"quant_method": "mxfp8"}, "mxfp8"),
            ({"quant_method": ["fp8"]}, r"\['fp8'\]"),
        ],
    )
    @pytest.mark.parametrize("nested", [False, True])
    def test_other_formats(self, folder, settings, method, nested, read, capfd):
        if nested:  # As in some models that also read images.
            config = transformers.Gemma3Config(text_config={"num_hidden_layers": 1})
            config.architectures = ["Gemma3ForConditionalGeneration"]
            (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
            text = json.loads((folder / "config.json").read_text())["text_config"]
            set_config(folder, text_config={**text, "quantization_config": settings})
        else:
            set_config(folder, quantization_config=settings)
        hint = self.refused(folder, read, rf"contains quantised weights \({method}\)$", capfd)
        assert "prune the unquantised original" in hint
        assert "model.dequantize()" in hint
