"""Experts that are stored in other ways than Mixtral's: transposed, interleaved, with biases, clamped, without a gate.

What an expert computes is written out here for each family, in NumPy and double precision, token by token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gated import EVERYTHING, assert_agrees
from mixture import Array, row_of, silu
from pruning import TEXT, disagreements, pruned, recipe, same_state, state
from tiny import VOCAB, tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from neuronrank_core import InputError, LayerStatistics, Recipe, ScoringContext, merge
from neuronrank_core.methods import method_for
from neuronrank_torch import find_decoder, prune, run_prune
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.layerwise import run_layers
from neuronrank_torch.pruning import layer as pruning_layer
from neuronrank_torch.runs.dry_run import plan_prune
from neuronrank_torch.runs.job import Job
from neuronrank_torch.text.sequences import calibration_sequences

HIDDEN, NEURONS, EXPERTS, LIMIT = 32, 24, 3, 0.7
COMMON = {
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


@dataclass
class Expert:
    """Matrices of an expert as (out_features, in_features), the biases of the first two, and what it computes."""

    weights: dict[str, Array]
    biases: dict[str, Array] = field(default_factory=dict)

    def pre(self, role: str, x: Array) -> Array:
        return x @ self.weights[role].T + self.biases.get(role, 0.0)


def stored(experts: Any, name: str, expert: int) -> Array:
    return getattr(experts, name)[expert].detach().double().numpy()


class GptOss:
    config = ("gpt_oss", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "swiglu_limit": LIMIT})
    mixer, moe_layers, first = "mlp", (0, 1), "gate_proj"

    @staticmethod
    def cut(experts: Any, e: int) -> Expert:
        both, bias = stored(experts, "gate_up_proj", e), stored(experts, "gate_up_proj_bias", e)
        weights = {"gate_proj": both[:, 0::2].T, "up_proj": both[:, 1::2].T}
        weights["down_proj"] = stored(experts, "down_proj", e).T
        return Expert(weights, {"gate_proj": bias[0::2], "up_proj": bias[1::2]})

    @staticmethod
    def product(expert: Expert, x: Array) -> Array:
        gate = np.minimum(expert.pre("gate_proj", x), LIMIT)
        up = np.clip(expert.pre("up_proj", x), -LIMIT, LIMIT)
        return (up + 1) * gate / (1 + np.exp(-1.702 * gate))

    @staticmethod
    def routed(mixer: Any, x: Array) -> Iterator[tuple[int, Array]]:
        """The experts of a token, each with what it is given."""
        logits = mixer.router.weight.detach().double().numpy() @ x + mixer.router.bias.detach().double().numpy()
        yield from ((int(e), x) for e in np.argsort(-logits)[:2])


class MiniMaxM3(GptOss):
    config = (
        "minimax_m3_vl_text",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "swiglu_limit": LIMIT, "n_shared_experts": 1}
        | {"dense_intermediate_size": 40, "shared_intermediate_size": 40, "mlp_layer_types": ["sparse"] * 2}
        | {"layer_types": ["full_attention"] * 2},
    )

    @staticmethod
    def cut(experts: Any, e: int) -> Expert:
        both = stored(experts, "gate_up_proj", e)
        weights = {"gate_proj": both[:NEURONS], "up_proj": both[NEURONS:]}
        return Expert(weights | {"down_proj": stored(experts, "down_proj", e)})

    @staticmethod
    def routed(mixer: Any, x: Array) -> Iterator[tuple[int, Array]]:
        logits = mixer.gate.weight.detach().double().numpy() @ x
        yield from ((int(e), x) for e in np.argsort(-logits)[:2])


class Aria(MiniMaxM3):
    config = ("aria_text", {"moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1})

    @staticmethod
    def cut(experts: Any, e: int) -> Expert:
        both = stored(experts, "gate_up_proj", e)
        weights = {"gate_proj": both[:, :NEURONS].T, "up_proj": both[:, NEURONS:].T}
        return Expert(weights | {"down_proj": stored(experts, "down_proj", e).T})

    @staticmethod
    def product(expert: Expert, x: Array) -> Array:
        return silu(expert.pre("gate_proj", x)) * expert.pre("up_proj", x)

    @staticmethod
    def routed(mixer: Any, x: Array) -> Iterator[tuple[int, Array]]:
        logits = mixer.router.weight.detach().double().numpy() @ x
        yield from ((int(e), x) for e in np.argsort(-logits)[:2])


class Llama4(Aria):
    config = (
        "llama4_text",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 40}
        | {"interleave_moe_layer_step": 2, "attention_chunk_size": 16, "num_hidden_layers": 2},
    )
    mixer, moe_layers = "feed_forward", (1,)

    @staticmethod
    def routed(mixer: Any, x: Array) -> Iterator[tuple[int, Array]]:
        logits = mixer.router.weight.detach().double().numpy() @ x
        expert = int(logits.argmax())
        yield expert, x / (1 + np.exp(-logits[expert]))


class NemotronH(GptOss):
    config = (
        "nemotron_h",
        {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": NEURONS}
        | {"moe_shared_expert_intermediate_size": 40, "n_group": 1, "topk_group": 1, "num_hidden_layers": 4}
        | {"layers_block_type": ["full_attention", "moe", "linear_attention", "mlp"], "norm_topk_prob": True}
        | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
    )
    mixer, moe_layers, first = "mixer", (1,), "up_proj"

    @staticmethod
    def cut(experts: Any, e: int) -> Expert:
        return Expert({name: stored(experts, name, e) for name in ("up_proj", "down_proj")})

    @staticmethod
    def product(expert: Expert, x: Array) -> Array:
        return np.maximum(expert.pre("up_proj", x), 0) ** 2

    routed = MiniMaxM3.routed


LAYOUTS: dict[str, Any] = {
    "gpt_oss": GptOss,
    "minimax_m3": MiniMaxM3,
    "aria": Aria,
    "llama4": Llama4,
    "nemotron_h": NemotronH,
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(autouse=True)
def everyone_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning_layer, "MINIMUM_TOKENS", 1)


def model_of(layout: Any) -> Any:
    """A model with weights, biases and gains far from their initial values."""
    name, options = layout.config
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **COMMON | options))
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.5)
            elif parameter.ndim > 1 and "conv" not in name:
                parameter.normal_(std=HIDDEN**-0.5)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return model.eval()


def mixers(model: Any, layout: Any) -> list[Any]:
    return [model.model.layers[i].get_submodule(layout.mixer) for i in layout.moe_layers]


@torch.no_grad()
def tables(model: Any, layout: Any, mixer: Any, chosen: Recipe) -> dict[int, LayerStatistics]:
    """The core's table of each expert, from what enters the mixture in plain passes of the whole model."""
    documents: list[Array] = []
    hook = mixer.register_forward_pre_hook(lambda module, args: documents.append(args[0].double().numpy()))
    for sequence in calibration_sequences(tiny_tokenizer(), chosen, TEXT):
        model(sequence[None], use_cache=False)
    hook.remove()
    rows: dict[int, list[LayerStatistics]] = {}
    for number, document in enumerate(documents):
        given: dict[int, list[Array]] = {}
        for token in document.reshape(-1, HIDDEN):
            for expert, x in layout.routed(mixer, token):
                given.setdefault(expert, []).append(x)
        for e, tokens in given.items():
            expert, x = layout.cut(mixer.experts, e), np.stack(tokens)
            gate, product = expert.pre(layout.first, x), layout.product(expert, x)
            signal = gate if chosen.signal == "gate" and layout.first == "gate_proj" else product
            rows.setdefault(e, []).append(row_of(number, x, gate, product, signal, chosen))
    return {e: merge(found) for e, found in rows.items()}


@every_layout
@pytest.mark.parametrize("signal", ["gate", "product"])
def test_statistics_are_those_of_the_expert_written_out(layout: Any, signal: str) -> None:
    model = model_of(layout).double()
    model.set_experts_implementation("eager")  # The grouped one knows no double precision.
    chosen = recipe(**EVERYTHING, signal=signal, threshold=0.1)
    found: dict[int, list[LayerStatistics | None]] = {}

    def visit(run: Any) -> None:
        with LayerCollector(run.layer, run.layer.mlps, chosen, chosen.seqlen) as collector:
            run.feed(keep=True, after=lambda start: collector.add_documents(start, chosen.seqlen))
        found[run.index] = collector.statistics()

    with torch.no_grad():
        run_layers(find_decoder(model), calibration_sequences(tiny_tokenizer(), chosen, TEXT), visit, batch_size=4)
    for index, mixer in zip(layout.moe_layers, mixers(model, layout), strict=True):
        expected = tables(model, layout, mixer, chosen)
        assert len(expected) == EXPERTS
        for expert, table in expected.items():
            assert_agrees(found[index][expert], table)


@every_layout
@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda", "sparsity_ratio": 0.37},
        {"method": "wanda", "sparsity_type": "2:4"},
        {"method": "neuronrank_tfidf", "sparsity_ratio": 0.37, "idf_exp": 0.0, "spikiness_exp": 1.0},
        {"method": "dass", "sparsity_ratio": 0.37},
        {"method": "ria", "sparsity_ratio": 0.37},
    ],
    ids=str,
)
def test_masks_are_those_of_the_expert_written_out(layout: Any, options: dict[str, Any]) -> None:
    dense, chosen = model_of(layout), recipe(**options, propagate="dense")
    model = copy.deepcopy(dense)
    report = pruned(model, chosen, batch_size=4)
    looked = 0
    for index, mixer, after in zip(layout.moe_layers, mixers(dense, layout), mixers(model, layout), strict=True):
        modules = next(layer.modules for layer in report.layers if layer.layer == index)
        for e, table in tables(dense, layout, mixer, chosen).items():
            was, now = layout.cut(mixer.experts, e), layout.cut(after.experts, e).weights
            context = ScoringContext(index, chosen, was.weights, table)
            for role, weight in was.weights.items():
                score = method_for(role, chosen).score(role, context)
                gone = now[role] == 0
                # Also asserts that each comparison group has exactly the number of zeros that it should.
                assert disagreements(gone, score, role, chosen) == 0
                assert np.array_equal(now[role], np.where(gone, 0, weight))
                assert modules[f"experts.{e}.{role}"].zeros == gone.sum()
                looked += 1
    assert looked == len(layout.moe_layers) * EXPERTS * (2 if layout is NemotronH else 3)


@every_layout
def test_all_else_stays_and_shared_experts_are_pruned(layout: Any) -> None:
    model = model_of(layout)
    before = state(model)
    report = pruned(model, recipe(method="magnitude"))
    half = {name for name, p in model.named_parameters() if abs((p == 0).double().mean() - 0.5) < 0.01}
    for name, parameter in model.named_parameters():
        assert (name in half) != torch.equal(parameter, before[name])
    matrices = {name for name in before if any(part in name for part in ("experts", "shared", "mlp.up", "mlp.down"))}
    matrices -= {name for name in before if "bias" in name}
    assert matrices <= half
    assert sum(p.numel() for name, p in model.named_parameters() if name in half) == report.total.prunable


@every_layout
@torch.no_grad()
def test_an_expert_puts_out_what_its_masked_matrices_do(layout: Any) -> None:
    dense = model_of(layout)
    model = copy.deepcopy(dense)
    pruned(model, recipe(method="wanda"))
    [was, *_], [now, *_] = mixers(dense, layout), mixers(model, layout)
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(0))
    masks = {role: w != 0 for role, w in layout.cut(now.experts, 1).weights.items()}
    masked = layout.cut(was.experts, 1)
    masked.weights = {role: w * masks[role] for role, w in masked.weights.items()}
    expected = layout.product(masked, x.double().numpy()) @ masked.weights["down_proj"].T
    if layout is GptOss:
        expected += stored(was.experts, "down_proj_bias", 1)
    if layout is Llama4:
        rows = torch.stack([torch.zeros_like(x), x, torch.zeros_like(x)])
        output = now.experts(rows.flatten(0, 1)).view_as(rows)[1]
    else:
        output = now.experts(x, torch.full((7, 1), 1), torch.ones(7, 1))
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-4, atol=1e-5)


@every_layout
def test_streamed_as_in_memory(layout: Any, tmp_path: Path) -> None:
    chosen, model = recipe(method="wanda"), model_of(layout)
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(TEXT)
    where = {name: str(tmp_path / name) for name in ("source", "text.txt", "out")}
    job = Job(where["source"], where["text.txt"], save=where["out"], device="cpu", batch_size=2)
    planned, report = plan_prune(job, chosen), run_prune(job, chosen)
    expected = prune(model, tiny_tokenizer(), chosen, TEXT, batch_size=2)
    out = AutoModelForCausalLM.from_pretrained(where["out"])
    assert same_state(state(out), state(model))
    assert [layer.modules for layer in report.layers] == [layer.modules for layer in expected.layers]
    assert planned.total.zeros == report.total.zeros
    assert [note for note in planned.notes if "MLP" in note] == [note for note in report.notes if "MLP" in note]


@pytest.mark.parametrize("layout", [GptOss, MiniMaxM3])
def test_a_gate_with_clamps_has_no_activation_of_its_own(layout: Any) -> None:
    model = model_of(layout)
    before = state(model)
    with pytest.raises(InputError, match=r"layer 0 expert 0: \w+Experts has no activation function of the gate alone"):
        pruned(model, recipe(method="neuronrank_tfidf", signal="activated"))
    assert same_state(state(model), before)
    pruned(model, recipe(method="wanda", signal="activated"))  # Which reads no signal.


def test_layers_without_an_mlp_are_named_and_left() -> None:
    model = model_of(NemotronH)
    before = state(model)
    report = pruned(model, recipe())
    assert [layer.layer for layer in report.layers] == [1, 3]
    assert report.notes == ("layers without an MLP are not pruned: 0, 2",)
    for name, parameter in model.named_parameters():
        assert "layers.1." in name or "layers.3." in name or torch.equal(parameter, before[name])


@pytest.mark.parametrize("asked", [{"update": "gradual"}, {"sparsity_type": "neurons"}, {"allocate": "neuronrank"}])
def test_layers_without_an_mlp_refuse_what_needs_one(asked: dict[str, Any]) -> None:
    model = model_of(NemotronH)
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in (2, 3)])
    before = state(model)
    with pytest.raises(InputError, match=r"needs an MLP in every layer, and layer 0 \(NemotronHBlock\) has none"):
        pruned(model, recipe(**asked))
    assert same_state(state(model), before)


def test_projections_around_the_experts_are_refused() -> None:
    name, options = NemotronH.config
    config = AutoConfig.for_model(name, **COMMON | options, moe_latent_size=16)
    with pytest.raises(InputError, match=r"layer 1 .* cannot be pruned: mixer\.fc1_latent_proj"):
        find_decoder(AutoModelForCausalLM.from_config(config))


def test_layers_that_share_an_mlp_are_refused() -> None:
    model = model_of(NemotronH)
    model.model.layers.append(model.model.layers[3])
    with pytest.raises(InputError, match="NemotronHModel has layers that share an MLP"):
        find_decoder(model)


def test_a_run_that_was_interrupted_goes_on_over_layers_without_an_mlp(tmp_path: Path) -> None:
    model_of(NemotronH).save_pretrained(tmp_path / "source", save_original_format=False)
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(TEXT)
    jobs = [
        Job(str(tmp_path / "source"), str(tmp_path / "text.txt"), save=str(tmp_path / out), device="cpu")
        for out in ("whole", "cut")
    ]

    def cut(stage: str, *_: int) -> None:
        if stage == "calibrating layer 4 of 4":
            raise KeyboardInterrupt

    whole = run_prune(jobs[0], recipe())
    with pytest.raises(KeyboardInterrupt):
        run_prune(jobs[1], recipe(), cut)
    stages: list[str] = []
    again = run_prune(jobs[1], recipe(), lambda stage, *_: stages.append(stage))
    assert "resuming: 3 of 4 layers" in " ".join(stages)
    assert [layer.modules for layer in again.layers] == [layer.modules for layer in whole.layers]
    assert again.notes == whole.notes
    one, other = (AutoModelForCausalLM.from_pretrained(job.save) for job in jobs)
    assert same_state(state(one), state(other))
