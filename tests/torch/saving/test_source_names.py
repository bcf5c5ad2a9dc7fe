"""What goes in comes out: every tensor of the source, under its name and in its shape, or the result names it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import TEXT, recipe, same_state
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from tiny_types import tiny_type
from torch import Tensor
from transformers import AutoConfig, conversion_mapping
from transformers.core_model_loading import ConversionOps, Transpose, WeightConverter

from neuronrank_core.errors import NeuronRankError
from neuronrank_torch import prune
from neuronrank_torch.model.converted import ConvertedWeights
from neuronrank_torch.model.open import load_model, open_model
from neuronrank_torch.model.weights import LoadedWeights
from neuronrank_torch.runs.dry_run import plan_prune
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.prune import run_prune
from neuronrank_torch.runs.prune_result import PruneResult
from neuronrank_torch.saving import model_writer

RECIPE = recipe(nsamples=3)
Tensors = dict[str, Tensor]

#: By type: a name in the checkpoint that is not in the model, and the matrices that are pruned, by their names there.
CONVERTED = {
    "afmoe": (r"layers\.1\.mlp\.experts\.0\.gate_proj", r"\.mlp\..*(gate|up|down)_proj"),
    "phimoe": (r"block_sparse_moe\.experts\.0\.w1", r"experts\.\d+\.w[123]"),
    "ernie4_5_moe": (r"experts\.0\.gate_proj", r"\.mlp\..*(gate|up|down)_proj"),
    "granitemoe": (r"block_sparse_moe\.input_linear", r"(input|output)_linear"),
    "olmo_hybrid": (r"attention_layer_norm", r"\.mlp\.(gate|up|down)_proj"),
    "gpt_neox": (r"embed_out\.weight", r"dense_(4h_to_h|h_to_4h)"),
    "gemma3": (r"^language_model\.model\.layers", r"language_model.*\.mlp\.(gate|up|down)_proj"),
    "exaone_moe": (r"mlp\.e_score_correction_bias", r"\.mlp\..*(gate|up|down)_proj"),
}


def write(folder: Path, model: Any, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tiny_tokenizer(True).save_pretrained(folder)
    return folder


def edit(folder: Path, change: Any) -> None:
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def stored(folder: Path) -> Tensors:
    return {n: t.clone() for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def job(source: Path, **options: Any) -> Job:
    text = source.with_name("text.txt")
    text.write_text(TEXT)
    return Job(str(source), str(text), save=str(source.with_name("out")), **options)


def streamed(source: Path) -> tuple[PruneResult, Tensors]:
    result = run_prune(job(source), RECIPE)
    return result, stored(source.with_name("out"))


def assert_only_zeros_differ(source: Tensors, out: Tensors, pruned: str) -> None:
    """A prune without an update sets half of the matrices' weights to zero, and changes nothing else."""
    assert out.keys() == source.keys()
    for name, tensor in source.items():
        assert (out[name].shape, out[name].dtype) == (tensor.shape, tensor.dtype), name
        kept = out[name] != 0
        assert torch.equal(out[name][kept], tensor[kept]), name
        if re.search(pruned, name) and tensor.ndim > 1:
            assert 0.4 < 1 - float(kept.float().mean()) <= 0.5, name
        else:
            assert torch.equal(out[name], tensor), name


def assert_loads_as_pruned_in_memory(source: Path) -> None:
    expected, tokenizer, _ = load_model(str(source))
    prune(expected, tokenizer, RECIPE, TEXT)
    plain = type(expected).from_pretrained(source.with_name("out"))
    assert same_state(plain.state_dict(), expected.state_dict())


@pytest.mark.parametrize(("model_type", "shards"), [*((name, False) for name in CONVERTED), ("afmoe", True)])
def test_names_and_shapes_are_those_of_the_source(
    tmp_path: Path, model_type: str, shards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shards:
        monkeypatch.setattr(model_writer, "SINGLE_FILE_BYTES", 0)
    model = tiny_type(model_type)
    source = write(tmp_path / "source", model)
    before = stored(source)
    name, pruned = CONVERTED[model_type]
    assert any(re.search(name, key) for key in before)
    assert not any(re.search(name, key) for key in model.state_dict())
    assert not isinstance(open_model(str(source))[0].source, LoadedWeights)
    result, out = streamed(source)
    assert_only_zeros_differ(before, out, pruned)
    assert not any("tensors" in note for note in result.notes)
    assert_loads_as_pruned_in_memory(source)


@pytest.mark.parametrize("model_type", ["phimoe", "granitemoe", "ernie4_5_moe", "gpt_neox", "gemma3"])
def test_a_run_in_memory_keeps_the_names_too(tmp_path: Path, model_type: str) -> None:
    source = write(tmp_path / "source", tiny_type(model_type))
    before = stored(source)
    result = run_prune(job(source), replace(RECIPE, sparsity_type="layers-by-influence", sparsity_ratio=0.5))
    depth = len(result.layers)
    kept = [layer.layer for layer in result.layers if not layer.removed]
    assert 0 < len(kept) < depth

    def renumbered(name: str) -> str | None:
        found = re.search(r"\blayers\.(\d+)\.", name)
        if found is None or "vision" in name:
            return name
        number = int(found[1])
        return name[: found.start(1)] + str(kept.index(number)) + name[found.end(1) :] if number in kept else None

    expected = {new: tensor for name, tensor in before.items() if (new := renumbered(name))}
    assert same_state(stored(source.with_name("out")), expected)
    plain = type(load_model(str(source))[0]).from_pretrained(source.with_name("out"))
    assert plain.config.get_text_config().num_hidden_layers == len(kept)
    assert not any("tensors" in note for note in result.notes)


@pytest.mark.parametrize("model_type", CONVERTED)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_a_layer_at_a_time_is_the_whole_model(tmp_path: Path, model_type: str, dtype: Any) -> None:
    source = write(tmp_path / "source", tiny_type(model_type))
    assert_same_as_whole(source, dtype)


def assert_same_as_whole(source: Path, dtype: Any) -> None:
    expected = load_model(str(source), dtype=dtype)[0].state_dict()
    model = open_model(str(source), dtype=dtype)[0]
    assert isinstance(model.source, ConvertedWeights)
    for unit in model.units:
        with model.resident(unit):
            for name, tensor in model.tensors(unit).items():
                assert tensor.dtype == expected[name].dtype, name
                assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "afmoe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_part_in_another_precision_needs_no_whole_model(tmp_path: Path, model_type: str, dtype: Any) -> None:
    model = tiny_type(model_type)
    kept = [*(model._keep_in_fp32_modules_strict or []), *(model._keep_in_fp32_modules or [])]
    assert kept
    source = write(tmp_path / "source", model)
    assert_same_as_whole(source, dtype)


@pytest.mark.parametrize("model_type", ["camembert", "xlm-roberta"])
@pytest.mark.parametrize("both", [False, True])
def test_a_tied_head_that_comes_before_the_embeddings(tmp_path: Path, model_type: str, both: bool) -> None:
    source = write(tmp_path / "source", tiny_type(model_type))
    if both:  # As in checkpoints that were not written by transformers.
        word = "roberta.embeddings.word_embeddings.weight"
        edit(source, lambda tensors: tensors.update({"lm_head.decoder.weight": tensors[word].clone()}))
    before = stored(source)
    assert ("lm_head.decoder.weight" in before) == both
    assert isinstance(open_model(str(source))[0].source, LoadedWeights) == both
    _, out = streamed(source)
    assert_only_zeros_differ(before, out, r"layer\.\d\.(intermediate|output)\.dense\.weight")


def test_a_tensor_that_the_model_does_not_use_is_copied(tmp_path: Path) -> None:
    """As the layers of DeepSeek-V3 and GLM-4-MoE that predict further tokens."""
    source = write(tmp_path / "source", tiny_type("deepseek_v3"))
    extra = {f"model.layers.2.{name}.weight": torch.randn(5, 3).bfloat16() for name in ("eh_proj", "shared_head.norm")}
    edit(source, lambda tensors: tensors.update(extra))
    before = stored(source)
    plan = plan_prune(job(source), RECIPE)
    result, out = streamed(source)
    assert_only_zeros_differ(before, out, r"layers\.[01]\.mlp\..*(gate|up|down)_proj")
    note = "tensors that the model does not use, copied unchanged: model.layers.2.eh_proj.weight and 1 more"
    assert note in result.notes
    assert note in plan.notes


def test_layers_that_would_keep_all_experts_are_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tiny_type("deepseek_v3"))
    left = [f"model.layers.2.{name}.weight" for name in ("eh_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")]
    kept = "model.other.weight"
    edit(source, lambda tensors: tensors.update({name: torch.randn(5, 3).bfloat16() for name in (*left, kept)}))
    fewer = replace(RECIPE, method="reap", sparsity_type="experts", sparsity_ratio=0.5)
    plan, result = plan_prune(job(source), fewer), run_prune(job(source), fewer)
    out = stored(tmp_path / "out")
    assert out.keys().isdisjoint(left)
    assert torch.equal(out[kept], stored(source)[kept])
    assert AutoConfig.from_pretrained(source).num_nextn_predict_layers == 1
    assert AutoConfig.from_pretrained(tmp_path / "out").num_nextn_predict_layers == 0
    note = "layers for multi-token prediction do not fit a smaller model, and are left out: model.layers.2.eh_proj"
    for notes in (plan.notes, result.notes):
        assert any(note in line for line in notes)


def test_a_copy_of_a_tied_weight_is_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tiny_model("llama", layers=2, hidden=32, intermediate=64, tied=True))
    edit(source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    before = stored(source)
    _, out = streamed(source)
    assert_only_zeros_differ(before, out, "mlp")
    assert_loads_as_pruned_in_memory(source)


def test_names_of_the_inner_model(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tiny_model("llama", layers=2, hidden=32, intermediate=64, tied=True).model)
    before = stored(source)
    assert "layers.0.mlp.up_proj.weight" in before
    assert not isinstance(open_model(str(source))[0].source, LoadedWeights)
    _, out = streamed(source)
    assert_only_zeros_differ(before, out, "mlp")
    assert_loads_as_pruned_in_memory(source)


class OneWay(Transpose):
    """A conversion without a reverse."""

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError


@pytest.mark.parametrize("operation", [Transpose(0, 1, check_dims=True), OneWay(0, 1)])
def test_what_cannot_be_reversed_is_named(
    tmp_path: Path, operation: ConversionOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix that transformers transposes (the first operation: if it has to), and never back."""
    source = write(tmp_path / "source", tiny_model("llama", layers=2, hidden=32, intermediate=64))
    transpose = WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [operation])
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [transpose])
    dense = stored(source)
    turned = {name: tensor.T.contiguous() for name, tensor in dense.items() if "down_proj" in name}
    edit(source, lambda tensors: tensors.update(turned))
    result, out = streamed(source)
    name = "model.layers.0.mlp.down_proj.weight"
    assert f"tensors saved as transformers holds them, not as the source does: {name} and 1 more" in result.notes
    assert_only_zeros_differ(dense, out, "mlp")


def test_an_output_that_lacks_a_tensor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source", tiny_type("afmoe"))
    as_stored = ConvertedWeights.as_stored

    def forget(self: ConvertedWeights, tensors: Tensors) -> Tensors:
        stored = as_stored(self, tensors)
        if not any(tensor.is_meta for tensor in stored.values()):
            stored.pop("model.layers.1.mlp.experts.2.up_proj.weight", None)
        return stored

    monkeypatch.setattr(ConvertedWeights, "as_stored", forget)
    with pytest.raises(NeuronRankError, match=r"not in the output: model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight"):
        streamed(source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["afmoe", "granitemoe", "gemma3"])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(tmp_path: Path, model_type: str) -> None:
    source = write(tmp_path / "source", tiny_type(model_type))
    run_prune(job(source), RECIPE)
    (tmp_path / "out").rename(tmp_path / "whole")

    def cut(stage: str, *_: int) -> None:
        if stage.startswith("calibrating layer 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_prune(job(source), RECIPE, cut)
    stages: list[str] = []
    run_prune(job(source), RECIPE, lambda stage, *_: stages.append(stage))
    assert any(stage.startswith("resuming: 1 of") for stage in stages)
    files = {file.name for file in (tmp_path / "whole").glob("*.safetensors")}
    assert files == {file.name for file in (tmp_path / "out").glob("*.safetensors")}
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


@pytest.mark.parametrize("kind", ["unstructured", "neurons", "layers"])
def test_layers_for_multi_token_prediction_do_not_follow_into_a_smaller_model(tmp_path: Path, kind: str) -> None:
    model = tiny_model(layers=4, hidden=32, intermediate=64)
    model.config.num_nextn_predict_layers = 1
    source = write(tmp_path / "source", model)
    extra = {"model.layers.4.mlp.up_proj.weight": torch.ones(64, 32), "mtp.norm.weight": torch.ones(32)}
    edit(source, lambda tensors: tensors.update(extra, **{"model.tower.weight": torch.ones(3)}))
    result = run_prune(job(source), recipe(sparsity_type=kind, nsamples=8))
    out = stored(source.with_name("out"))
    config = json.loads((source.with_name("out") / "config.json").read_text())
    said = [note for note in result.notes if "multi-token prediction do not fit" in note]
    if kind == "unstructured":
        assert out.keys() >= {*extra, "model.tower.weight"}
        assert config["num_nextn_predict_layers"] == 1
        assert said == []
    else:
        assert not out.keys() & extra.keys()
        assert config["num_nextn_predict_layers"] == 0
        assert len(said) == 1
        assert said[0].endswith("model.layers.4.mlp.up_proj.weight and 1 more")
        # A model that is loaded as a whole has nothing but what it uses.
        assert ("model.tower.weight" in out) == (kind == "neurons")
        assert any("model.tower.weight" in note for note in result.notes)
