"""Plain MLPs, two matrices without a gate, are pruned as the definitions say; all is recomputed from plain passes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import COMMON, FAMILIES, GPT, HIDDEN, NEURONS, every_family, matrices, plain, weight_of
from pruning import TEXT, pruned, recipe, same_state, seen, small, state
from safetensors.torch import load_file
from tiny import VOCAB, tiny_tokenizer
from tiny_files import write_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from neuronrank_core import InputError, NeuronRankError
from neuronrank_core.errors import UnsupportedModelError
from neuronrank_torch import find_decoder, prune, run_prune
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.layerwise import run_layers
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.evaluation.perplexity import evaluate
from neuronrank_torch.model.open import open_model
from neuronrank_torch.model.structure import Layer
from neuronrank_torch.runs.collect import run_collect
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.verify.reference import observe
from neuronrank_torch.text.sequences import calibration_sequences


@every_family
@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "wanda"},
        {"method": "neuronrank_wanda"},
        {"method": "neuronrank_tfidf", "tfidf_mode": "topic", "signal": "activated"},
        {"method": "neuronrank_old"},
        {"method": "dass"},
        {"method": "ria"},
        {"method": "magnitude"},
        {"method": "wanda", "sparsity_type": "2:4"},
    ],
    ids=str,
)
def test_zeros_are_exact_and_nothing_else_changes(family: str, chosen: dict[str, Any]) -> None:
    model = plain(family)
    before = state(model)
    report = pruned(model, recipe(**chosen), batch_size=2)
    changed = set()
    for layer in matrices(model, family):
        for module in layer.values():
            assert int((module.weight == 0).sum()) == module.weight.numel() // 2
            changed.add(id(module.weight))
    for name, parameter in model.named_parameters():
        kept = parameter != 0 if id(parameter) in changed else torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter[kept], before[name][kept])
    assert [list(layer.modules) for layer in report.layers] == [["up_proj", "down_proj"]] * 2


@every_family
def test_wandas_masks_are_those_of_a_plain_pass(family: str) -> None:
    model, chosen = plain(family), recipe(method="wanda", propagate="dense")
    dense = copy.deepcopy(model)
    pruned(model, chosen, batch_size=4)
    for before, after in zip(matrices(dense, family), matrices(model, family), strict=True):
        for module, (x, _) in zip(before.values(), seen(dense, list(before.values()), chosen), strict=True):
            weight = weight_of(module)
            score = weight.abs() * x.flatten(0, 1).square().mean(0).sqrt()
            mask = torch.zeros_like(weight, dtype=torch.bool)
            mask.scatter_(1, score.argsort(dim=1)[:, : weight.shape[1] // 2], True)
            role = next(role for role, m in before.items() if m is module)
            assert torch.equal(weight_of(after[role]) == 0, mask)


@pytest.mark.parametrize("update", ["none", "gradual"])
def test_attention_whose_output_matrix_is_called_out_proj(update: str) -> None:
    model, chosen = plain("opt"), recipe(method="wanda", include_attention=True, update=update, propagate="dense")
    dense = copy.deepcopy(model)
    pruned(model, chosen, batch_size=4)
    for before, after in zip(dense.model.decoder.layers, model.model.decoder.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            module, other = getattr(before.self_attn, name), getattr(after.self_attn, name)
            assert ((other.weight == 0).sum(1) == HIDDEN // 2).all()
            if update == "none":
                [(x, _)] = seen(dense, [module], chosen)
                score = module.weight.abs() * x.flatten(0, 1).square().mean(0).sqrt()
                lowest = score.argsort(dim=1)[:, : HIDDEN // 2]
                assert torch.equal((other.weight == 0).nonzero()[:, 1].view(HIDDEN, -1), lowest.sort(dim=1).values)


@every_family
@pytest.mark.parametrize("signal", ["gate", "activated", "product"])
def test_every_signal_is_the_product(family: str, signal: str) -> None:
    model, chosen = plain(family), recipe(method="neuronrank_tfidf", input_exp=1.0, signal=signal, threshold=0.1)
    sequences = calibration_sequences(tiny_tokenizer(), chosen, TEXT)
    tables = []

    def visit(run: Any) -> None:
        with LayerCollector(run.layer, run.layer.mlps, chosen, chosen.seqlen) as collector:
            run.feed(keep=True, after=lambda start: collector.add_documents(start, chosen.seqlen))
        tables.extend(collector.statistics())

    with torch.no_grad():
        run_layers(find_decoder(model), sequences, visit, batch_size=4)
    for layer, table in zip(matrices(model, family), tables, strict=True):
        (x, pre), (h, _) = seen(model, list(layer.values()), chosen)
        close = {"rtol": 1e-4, "atol": 1e-5}
        assert set(table.input_mean_square) == {"gate_proj", "down_proj"}
        np.testing.assert_allclose(table.input_mean_square["gate_proj"], x.square().mean(1), **close)
        np.testing.assert_allclose(table.input_mean_square["down_proj"], h.square().mean(1), **close)
        np.testing.assert_allclose(table.signal_mean, h.abs().mean(1), **close)
        np.testing.assert_allclose(table.signal_mean_square, h.square().mean(1), **close)
        np.testing.assert_allclose(table.signal_max, h.abs().amax(1), **close)
        sure = ((pre - 0.1).abs() > 1e-4).all(1)
        assert sure.float().mean() > 0.9
        assert (torch.as_tensor(table.open_gate) == (pre > 0.1).sum(1))[sure].all()


@pytest.mark.parametrize("signal", ["gate", "activated", "product"])
def test_the_result_says_which_signal_was_measured(signal: str, tmp_path: Path) -> None:
    where = {name: str(tmp_path / name) for name in ("source", "text.txt", "stats")}
    write_model(where["source"], plain("gpt2"), bos=False)
    Path(where["text.txt"]).write_text(TEXT)
    chosen = recipe(method="neuronrank_tfidf", propagate="dense", signal=signal)
    collected = run_collect(Job(where["source"], where["text.txt"], save=where["stats"], device="cpu"), chosen)
    assert (collected.signal, collected.gated) == ("product", False)
    by_text, by_statistics = plain("gpt2"), plain("gpt2")
    assert pruned(by_text, chosen).recipe.signal == "product"
    # Statistics of another setting hold the same signal.
    other = replace(chosen, signal="activated")
    report = prune(by_statistics, tiny_tokenizer(), other, statistics=StatisticsFolder(where["stats"]))
    assert report.recipe.signal == "product"
    assert same_state(state(by_text), state(by_statistics))


def test_a_gated_model_keeps_the_signal() -> None:
    report = pruned(small(), recipe(method="neuronrank_tfidf", signal="activated"))
    assert report.recipe.signal == "activated"


@every_family
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_an_update_lowers_the_error_of_the_mlp(family: str, propagate: str) -> None:
    dense, errors = plain(family), {}
    chosen = {"method": "wanda", "nsamples": 24, "propagate": propagate}

    def output(model: Any) -> Tensor:
        [(_, found)] = seen(model, [matrices(model, family)[0]["down_proj"]], recipe(**chosen))
        return found

    for update in ("none", "least-squares", "gradual"):
        model = copy.deepcopy(dense)
        pruned(model, recipe(**chosen, update=update), batch_size=8)
        for layer in matrices(model, family):
            for module in layer.values():
                assert int((module.weight == 0).sum()) == module.weight.numel() // 2
        errors[update] = float((output(model) - output(dense)).norm() / output(dense).norm())
    assert errors["least-squares"] < 0.9 * errors["none"]
    assert errors["gradual"] < 0.9 * errors["none"]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"bloom", "ctrl"}))
@pytest.mark.parametrize("update", ["none", "least-squares"])
def test_neurons_are_removed(family: str, update: str, tmp_path: Path) -> None:
    model = plain(family)
    dense = copy.deepcopy(model)
    pruned(model, recipe(sparsity_type="neurons", sparsity_ratio=0.25, update=update))
    for layer, before in zip(matrices(model, family), matrices(dense, family), strict=True):
        up, was = weight_of(layer["up_proj"]), weight_of(before["up_proj"])
        kept = [j for j in range(NEURONS) if any(torch.equal(was[j], row) for row in up)]
        assert len(kept) == 0.75 * NEURONS
        assert torch.equal(up, was[kept])
        assert torch.equal(layer["up_proj"].bias, before["up_proj"].bias[kept])
        down, was = weight_of(layer["down_proj"]), weight_of(before["down_proj"])
        assert torch.equal(down, was[:, kept]) == (update == "none")
        assert torch.equal(layer["down_proj"].bias, before["down_proj"].bias) == (update == "none")
    model.save_pretrained(tmp_path)
    tokens = torch.arange(20)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_an_mlp_that_runs_in_chunks_is_refused() -> None:
    model = plain("bert")
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 8
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=r"^layer 0 \(BertLayer\) runs its MLP on chunks of the text$"):
        pruned(model, recipe())
    assert same_state(before, state(model))


def test_neurons_of_a_width_that_the_configuration_leaves_open(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", **{**GPT, "n_inner": None}, **COMMON)
    model = AutoModelForCausalLM.from_config(config).eval()
    pruned(model, recipe(sparsity_type="neurons", sparsity_ratio=0.25))
    assert model.config.n_inner == 3 * HIDDEN
    model.save_pretrained(tmp_path)
    again, tokens = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("change", [{}, {"ffn_dim": NEURONS + 1}], ids=["bloom", "opt"])
def test_neurons_of_a_width_that_the_configuration_does_not_state_are_refused(change: dict[str, int]) -> None:
    model = plain("opt" if change else "bloom")
    model.config.update(change)
    name = next(iter(change), "intermediate_size")
    with pytest.raises(InputError, match=f"the width of the MLPs of .* is not the {name} of its configuration"):
        pruned(model, recipe(sparsity_type="neurons"))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
def test_ratios_between_layers_keep_the_total(family: str) -> None:
    model = plain(family)
    report = pruned(model, recipe(method="neuronrank_tfidf", allocate="neuronrank"))
    assert report.total.zeros == report.total.prunable // 2


@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_ratios_between_layers_and_modules_keep_the_total_of_modules(family: str, ratio: float) -> None:
    how = {"method": "neuronrank_tfidf", "sparsity_ratio": ratio, "compare": "module"}
    modules, both = (pruned(plain(family), recipe(allocate=name, **how)).total.zeros for name in ("modules", "both"))
    assert both == modules


@pytest.mark.parametrize(
    ("family", "update"), [("opt", "none"), ("opt", "gradual"), ("bert", "none"), ("gpt2", "gradual")]
)
def test_streamed_as_in_memory(family: str, update: str, tmp_path: Path) -> None:
    model, chosen = plain(family), recipe(update=update)
    write_model(tmp_path / "source", model, bos=False)
    (tmp_path / "text.txt").write_text(TEXT)
    where = {name: str(tmp_path / name) for name in ("source", "text.txt", "out", "right")}
    run_prune(Job(where["source"], where["text.txt"], save=where["out"], device="cpu", batch_size=2), chosen)
    prune(model, tiny_tokenizer(), chosen, TEXT, batch_size=2)
    model.save_pretrained(where["right"])
    source, out, right = (load_file(f"{where[name]}/model.safetensors") for name in ("source", "out", "right"))
    assert source.keys() == out.keys() == right.keys()
    assert all(torch.equal(out[name], right[name]) for name in right)
    assert not all(torch.equal(out[name], source[name]) for name in source)


@pytest.mark.parametrize("family", ["opt", "gpt2", "bert", "bloom"])
def test_collected_statistics_prune_as_text_does(family: str, tmp_path: Path) -> None:
    model, chosen = plain(family), recipe(propagate="dense", method="wanda")
    write_model(tmp_path / "source", model, bos=False)
    (tmp_path / "text.txt").write_text(TEXT)
    where = {name: str(tmp_path / name) for name in ("source", "text.txt", "stats", "out")}
    run_collect(Job(where["source"], where["text.txt"], save=where["stats"], device="cpu", batch_size=2), chosen)
    run_prune(Job(where["source"], save=where["out"], stats=where["stats"], device="cpu"), chosen)
    pruned(model, chosen, batch_size=2)
    out = AutoModelForCausalLM.from_pretrained(where["out"])
    assert same_state(state(model), state(out))


@every_family
def test_streamed_perplexity_is_that_in_memory(family: str, tmp_path: Path) -> None:
    # Some layers return a tuple: so must those that a streamed evaluation leaves out.
    model = plain(family)
    write_model(tmp_path, model, bos=False)
    options: dict[str, Any] = {"seqlen": 32, "windows": 4, "batch_size": 2}
    here = evaluate(model, tiny_tokenizer(), TEXT, **options)
    streamed, tokenizer, _ = open_model(str(tmp_path))
    there = evaluate(streamed.model, tokenizer, TEXT, resident=streamed.resident, **options)
    assert there.perplexity == pytest.approx(here.perplexity, rel=1e-5)


def test_verify_refuses_it() -> None:
    sequences = calibration_sequences(tiny_tokenizer(), recipe(), TEXT)
    with pytest.raises(UnsupportedModelError, match=r"layer 0 \(GPT2Block\) has a plain MLP, without a gate"):
        observe(plain("gpt2"), sequences, recipe(), layers=2, batch_size=1, look=lambda observed: None)


class _Passing(nn.Module):
    """Layers that return numbers besides hidden states; the next layer may get them."""

    class Config:
        max_position_embeddings = 512

        def get_text_config(self) -> Any:
            return self

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Module()
            self.mlp.up_proj, self.mlp.down_proj = nn.Linear(HIDDEN, NEURONS), nn.Linear(NEURONS, HIDDEN)

        def forward(self, hidden: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
            hidden = hidden if other is None else hidden + other
            return hidden + self.mlp.down_proj(self.mlp.up_proj(hidden).relu()), hidden.mean(-1, keepdim=True)

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.config = how, self.Config()
        self.embed, self.layers = nn.Embedding(VOCAB, HIDDEN), nn.ModuleList([self.Inner() for _ in range(2)])

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        del use_cache
        first = hidden = self.embed(input_ids)
        others: list[Tensor] = []
        for layer in self.layers if self.how != "skip" else self.layers[:1]:
            if self.how == "between" and others:
                hidden = hidden + others[-1]
            passed = [others[-1] * 2] if self.how == "on" and others else []
            if self.how in ("input", "output") and others:
                passed = [(first if self.how == "input" else hidden)[..., :1] * 2]
            hidden, other = layer(hidden, *passed)
            others.append(other)
        return hidden


@pytest.mark.parametrize("how", ["on", "between", "input", "output"])
def test_a_layer_gets_nothing_from_earlier_ones_but_hidden_states(how: str) -> None:
    model = _Passing(how)
    before = state(model)
    with pytest.raises(NeuronRankError, match="_Passing passes more than hidden states from layer to layer"):
        pruned(model, recipe(method="wanda"))
    assert same_state(before, state(model))


def test_a_layer_that_is_not_called_is_found_before_the_model_is_changed() -> None:
    model = _Passing("skip")
    before = state(model)
    with pytest.raises(NeuronRankError, match="_Passing called 1 of its 2 layers"):
        pruned(model, recipe(method="wanda"))
    assert same_state(before, state(model))


def test_what_a_layer_returns_besides_may_be_left_lying() -> None:
    model = _Passing("not at all")
    assert isinstance(find_decoder(model).layers[0], Layer)
    report = pruned(model, recipe(method="wanda"))
    assert report.total.zeros == report.total.prunable // 2


@pytest.mark.parametrize("name", ["router", "input_norm"])
def test_the_matrices_of_a_router_or_norm_are_no_mlp(name: str) -> None:
    model = plain("gpt2")
    for block in model.transformer.h:
        other = nn.Module()
        other.fc1, other.fc2 = nn.Linear(HIDDEN, NEURONS), nn.Linear(NEURONS, HIDDEN)
        block.add_module(name, other)
    assert [layer.mlp.module for layer in find_decoder(model).layers] == [block.mlp for block in model.transformer.h]


def test_a_model_without_embeddings_of_its_own_is_refused() -> None:
    model = _Passing("not at all")
    model.embed = nn.ModuleList([model.embed])
    with pytest.raises(InputError, match="_Passing has no single table of input embeddings"):
        pruned(model, recipe(method="wanda"))
