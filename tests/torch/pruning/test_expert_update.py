"""The update, the removal of neurons and the allocation see of each expert what the router sends to it.

The tokens of an expert are found in NumPy (``mixture.py``), and the core alone fits its weights in double precision.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from experts import FAMILIES
from mixture import inputs, mixture, seen_by_experts, silu, tables, weights_of
from pruning import TEXT, pruned, random_model, recipe, same_state, state
from tiny import tiny_tokenizer
from torch import Tensor, nn

from neuronrank_core import InputError, Recipe, ScoringContext
from neuronrank_core.selection.allocation import error_histogram, typical_square_norm
from neuronrank_core.update.few_tokens import shrunk_gram, shrunk_target
from neuronrank_core.update.least_squares import absorb, least_squares_update
from neuronrank_torch.calibration.layerwise import run_layers
from neuronrank_torch.distributed.ranks import ALONE
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.structure import find_decoder
from neuronrank_torch.pruning.allocation import AllocationPass
from neuronrank_torch.text.sequences import calibration_sequences

FITTED = recipe(update="least-squares", sparsity_ratio=0.5)
NEURONS = recipe(sparsity_type="neurons", sparsity_ratio=0.5, update="least-squares")


def tokens_of(dense: nn.Module, layer: int, chosen: Recipe) -> dict[int, np.ndarray]:
    """The tokens of each expert of a layer, in a run of the whole model."""
    found: dict[int, list[np.ndarray]] = {}
    for document in inputs(dense, layer, chosen):
        for expert, rows in seen_by_experts(dense.model.layers[layer].mlp, document).items():
            found.setdefault(expert, []).append(rows)
    return {expert: np.concatenate(rows) for expert, rows in found.items()}


def product(weight: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return silu(x @ weight["gate_proj"].T) * (x @ weight["up_proj"].T)


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_expert_is_fitted_to_its_own_tokens(propagate: str, batch_size: int) -> None:
    dense, chosen = mixture("qwen3_moe"), recipe(update="least-squares", propagate=propagate)
    model = copy.deepcopy(dense)
    pruned(model, chosen, batch_size=batch_size)
    found = tokens_of(dense, 0, chosen)
    assert len({len(x) for x in found.values()}) > 3
    for expert, x in found.items():
        was, now = weights_of(dense, 0, expert), weights_of(model, 0, expert)
        for role in ("gate_proj", "up_proj"):
            gram = shrunk_gram(x.T @ x, len(x))
            fitted = least_squares_update(was[role], now[role] == 0, gram, np.linalg.inv)
            np.testing.assert_allclose(now[role], fitted, rtol=1e-3, atol=1e-4)
        h, target = product(now if propagate == "pruned" else was, x), None
        if propagate == "pruned":
            dense_outputs = product(was, x) @ was["down_proj"].T
            target = shrunk_target(dense_outputs.T @ h, was["down_proj"], h.T @ h, len(x))
        gram = shrunk_gram(h.T @ h, len(x))
        fitted = least_squares_update(was["down_proj"], now["down_proj"] == 0, gram, np.linalg.inv, target=target)
        np.testing.assert_allclose(now["down_proj"], fitted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chosen", [FITTED, NEURONS, recipe(update="gradual")])
def test_an_expert_that_no_token_reaches_keeps_its_weights(chosen: Recipe) -> None:
    chosen = replace(chosen, nsamples=1, seqlen=2)
    dense = mixture("qwen3_moe")
    model, without = copy.deepcopy(dense), copy.deepcopy(dense)
    pruned(model, chosen)
    pruned(without, replace(chosen, update="none"))
    never = {*range(6)} - {*tokens_of(dense, 0, chosen)}
    assert never
    changed = set()
    for expert in range(6):
        ours, theirs = weights_of(model, 0, expert), weights_of(without, 0, expert)
        same = all(np.array_equal(ours[role], theirs[role]) for role in ours)
        changed |= set() if same else {expert}
        assert same or expert not in never
    assert changed


@torch.no_grad()
def test_attention_that_is_pruned_too_changes_what_experts_get() -> None:
    """Experts are fitted on what the updated attention lets through, as those of a model whose attention is pruned."""
    dense, chosen = mixture("mixtral"), recipe(update="least-squares", include_attention=True)
    model = copy.deepcopy(dense)
    pruned(model, chosen)
    halfway = copy.deepcopy(dense)
    halfway.model.layers[0].self_attn.load_state_dict(model.model.layers[0].self_attn.state_dict())
    found, before = tokens_of(halfway, 0, chosen), tokens_of(dense, 0, chosen)
    assert any(len(found[expert]) != len(before[expert]) for expert in found)
    for expert, x in found.items():
        was, now = weights_of(dense, 0, expert), weights_of(model, 0, expert)
        fitted = least_squares_update(was["up_proj"], now["up_proj"] == 0, shrunk_gram(x.T @ x, len(x)), np.linalg.inv)
        np.testing.assert_allclose(now["up_proj"], fitted, rtol=1e-3, atol=1e-4)
        h, target = product(now, x), product(was, x) @ was["down_proj"].T
        target = shrunk_target(target.T @ h, was["down_proj"], h.T @ h, len(x))
        gram = shrunk_gram(h.T @ h, len(x))
        fitted = least_squares_update(was["down_proj"], now["down_proj"] == 0, gram, np.linalg.inv, target=target)
        np.testing.assert_allclose(now["down_proj"], fitted, rtol=1e-3, atol=1e-4)


def kept_by(dense: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> list[int]:
    """Indices of the neurons of an expert that are left, by their rows of ``up_proj``."""
    rows = [row.tobytes() for row in dense["up_proj"]]
    return [rows.index(row.tobytes()) for row in now["up_proj"]]


def test_neurons_of_every_expert_are_absorbed_by_the_others_on_its_own_tokens() -> None:
    dense = mixture("qwen3_moe")
    model = copy.deepcopy(dense)
    pruned(model, NEURONS)
    found, kept = tokens_of(dense, 0, NEURONS), {}
    for expert, x in found.items():
        was, now = weights_of(dense, 0, expert), weights_of(model, 0, expert)
        kept[expert] = kept_by(was, now)
        assert len(kept[expert]) == 16
        np.testing.assert_array_equal(now["gate_proj"], was["gate_proj"][kept[expert]])
        h = product(was, x)
        fitted = absorb(was["down_proj"], np.array(kept[expert]), shrunk_gram(h.T @ h, len(x)), np.linalg.inv)
        np.testing.assert_allclose(now["down_proj"], fitted, rtol=1e-3, atol=1e-4)
    assert len({tuple(of) for of in kept.values()}) == len(kept), "each expert loses its own"


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_without_an_update_it_is_the_model_with_silent_neurons(family: str) -> None:
    dense = random_model(copy.deepcopy(FAMILIES[family][0]))
    model, tokens = copy.deepcopy(dense), torch.arange(2, 50).view(2, 24)
    pruned(model, recipe(sparsity_type="neurons", sparsity_ratio=0.4, multiple_of=4))
    for was, now in zip(find_decoder(dense).layers, find_decoder(model).layers, strict=True):
        for old, new in zip(was.mlps, now.mlps, strict=True):
            kept = (old.weights["up_proj"][:, None] == new.weights["up_proj"]).all(-1).any(1)
            assert kept.sum() == new.neurons < old.neurons
            old.weights["down_proj"][:, ~kept] = 0  # What a neuron of gpt-oss is without its rows is not zero.
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_biases_of_experts_are_fitted() -> None:
    """gpt-oss: outputs keep their mean on an expert's tokens, which needs its biases."""
    dense = random_model(copy.deepcopy(FAMILIES["gpt_oss"][0]))
    chosen = recipe(update="least-squares", nsamples=24, seqlen=48)
    model, without = copy.deepcopy(dense), copy.deepcopy(dense)
    pruned(model, chosen)
    pruned(without, recipe(nsamples=24, seqlen=48))
    experts = [find_decoder(m).layers[0].experts for m in (dense, model, without)]
    seen: list[tuple[Tensor, ...]] = []
    hook = experts[0].on_tokens(lambda *args: seen.append(args))
    for sequence in calibration_sequences(tiny_tokenizer(), chosen, TEXT):
        dense(sequence[None])
    hook.remove()
    for expert in range(5):
        x = torch.cat([rows[(of == expert).any(-1)] for rows, of, _ in seen])
        outputs = [e.module.forward(x, torch.full((len(x), 1), expert), torch.ones(len(x), 1)) for e in experts]
        errors = [(out - outputs[0]).mean(0).norm() for out in outputs[1:]]
        assert errors[0] < 0.3 * errors[1]
        assert not torch.equal(experts[1].module.down_proj_bias[expert], experts[0].module.down_proj_bias[expert])
        assert not torch.equal(experts[1].module.gate_up_proj_bias[expert], experts[0].module.gate_up_proj_bias[expert])


@torch.no_grad()
def test_the_allocation_counts_errors_by_how_much_of_the_output_an_expert_is() -> None:
    dense, chosen = mixture("qwen3_moe"), recipe(allocate="neuronrank", method="wanda")
    seen: list[tuple[Tensor, Tensor]] = []
    mlp = dense.model.layers[0].mlp
    hook = mlp.gate.register_forward_hook(lambda module, args, out: seen.append((out[1], out[2])))
    documents = inputs(dense, 0, chosen)
    hook.remove()
    decoder = find_decoder(dense)
    looked = AllocationPass(decoder.layers, chosen, TorchKernels(), ALONE)
    run_layers(decoder, calibration_sequences(tiny_tokenizer(), chosen, TEXT), looked.visit)
    streams: list[np.ndarray] = []
    hook = dense.model.layers[1].register_forward_pre_hook(lambda module, args: streams.append(args[0][0].numpy()))
    for sequence in calibration_sequences(tiny_tokenizer(), chosen, TEXT):
        dense(sequence[None])
    hook.remove()
    typical = typical_square_norm(np.linalg.norm(np.stack(streams), axis=-1))
    squares = dict.fromkeys(range(6), 0.0)
    for factors, of in seen:
        for weights, experts in zip(factors.tolist(), of.tolist(), strict=True):
            for weight, expert in zip(weights, experts, strict=True):
                squares[expert] += weight**2
    total = sum(len(document) for document in documents)
    expected = 0
    for expert, table in tables(dense, 0, documents, chosen).items():
        context = ScoringContext(0, chosen, weights_of(dense, 0, expert), table)
        expected = expected + error_histogram(context, typical * total / squares[expert])
    # A weight at an edge of a bin may fall into the next.
    assert np.abs(looked.histograms[0] - expected).sum() < 0.01 * expected.sum()
    assert looked.histograms[0].sum() == sum(p.numel() for p in mlp.experts.parameters())


def test_experts_of_a_layer_share_one_ratio() -> None:
    model, uniform = mixture("mixtral", layers=3), mixture("mixtral", layers=3)
    report = pruned(model, recipe(allocate="neuronrank", method="magnitude"))
    assert report.total.zeros == pruned(uniform, recipe(method="magnitude")).total.zeros
    shares = [{m.sparsity for m in layer.modules.values()} for layer in report.layers]
    # A layer takes up what rounding left over.
    assert all(max(own) - min(own) < 0.01 for own in shares)
    assert len({round(min(own), 2) for own in shares}) > 1


def test_neurons_that_torch_cannot_multiply_are_refused() -> None:
    model = random_model(copy.deepcopy(FAMILIES["olmoe"][0]))
    before = state(model)
    with pytest.raises(InputError, match="experts with 10 neurons cannot run") as error:
        pruned(model, recipe(sparsity_type="neurons"))
    assert error.value.hint == "use --multiple-of 4"
    assert same_state(state(model), before)
