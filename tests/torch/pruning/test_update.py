"""The weight update on models: exact sparsity, better layers, the core's mathematics on tensors."""

from __future__ import annotations

import copy
from contextlib import suppress

import numpy as np
import pytest
import torch
from pruning import MLP, TEXT, fit_down_to_its_own_outputs, linears, pruned, recipe, small, zeros
from tiny import tiny_tokenizer

from neuronrank_core.errors import NonFiniteError
from neuronrank_core.kernels import lowest_k
from neuronrank_core.methods import needs_text
from neuronrank_core.update.least_squares import absorb, gradual_update, least_squares_update, residual_norm
from neuronrank_torch.calibration.gram import DenseOutputs, GramCollector, add_gram, mirrored
from neuronrank_torch.distributed.ranks import ALONE
from neuronrank_torch.kernels import TorchKernels, inverse
from neuronrank_torch.model.early_stop import StopForward
from neuronrank_torch.model.structure import resolve_layer
from neuronrank_torch.text.sequences import calibration_sequences

UPDATE = {"update": "least-squares"}
GRADUAL = {"update": "gradual"}


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 24)) @ rng.normal(size=(24, 24))
    return X, rng.normal(size=(10, 24)), rng.random((10, 24)) < 0.5


def test_tensors_give_what_the_core_gives() -> None:
    X, W, mask = problem()
    gram = X.T @ X
    expected = least_squares_update(W, mask, gram, np.linalg.inv)
    tensors = [torch.tensor(array, dtype=torch.float32) for array in (W, gram)]
    fitted = least_squares_update(tensors[0], torch.tensor(mask), tensors[1], inverse)
    np.testing.assert_allclose(fitted.numpy(), expected, rtol=1e-3, atol=1e-4)
    kept = np.arange(0, 24, 2)
    expected = absorb(W, kept, gram, np.linalg.inv)
    absorbed = absorb(tensors[0], torch.tensor(kept), tensors[1], inverse)
    np.testing.assert_allclose(absorbed.numpy(), expected, rtol=1e-3, atol=1e-4)
    norm = residual_norm(tensors[1], inverse)
    np.testing.assert_allclose(norm.numpy(), residual_norm(gram, np.linalg.inv), rtol=1e-4)


def test_tensors_give_what_the_core_gives_gradually() -> None:
    X, W, _ = problem()
    gram = X.T @ X
    expected = gradual_update(W, lambda V, share: lowest_k(np.abs(V), int(12 * share)), gram, np.linalg.inv)
    tensors = [torch.tensor(array, dtype=torch.float32) for array in (W, gram)]
    fitted = gradual_update(
        tensors[0], lambda V, share: TorchKernels().lowest_k(V.abs(), int(12 * share)), tensors[1], inverse
    )
    np.testing.assert_allclose(fitted.numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"propagate": "dense"}, {"include_attention": True}], ids=str)
@pytest.mark.parametrize("update", [UPDATE, GRADUAL], ids=str)
def test_sparsity_stays_exact(family: str, options: dict[str, object], update: dict[str, object]) -> None:
    model = small(family)  # type: ignore[arg-type]
    report = pruned(model, recipe(**update, **options))
    assert report.total.zeros == report.total.prunable // 2
    assert all(module.zeros == module.size // 2 for layer in report.layers for module in layer.modules.values())


def test_the_first_layer_loses_the_same_weights_with_and_without() -> None:
    plain, updated = small(), small()
    pruned(plain, recipe())
    pruned(updated, recipe(**UPDATE))
    for name in MLP:
        assert (zeros(plain, 0)[name] == zeros(updated, 0)[name]).all()
        assert not torch.equal(linears(plain, 0)[name].weight, linears(updated, 0)[name].weight)


@pytest.mark.parametrize("sparsity_type", ["unstructured", "2:4"])
def test_output_of_the_first_mlp_is_closer_to_the_dense_one(sparsity_type: str) -> None:
    dense = small(layers=1)
    chosen = recipe(sparsity_type=sparsity_type, nsamples=16)
    models = [copy.deepcopy(dense) for _ in range(2)]
    pruned(models[0], chosen)
    pruned(models[1], recipe(sparsity_type=sparsity_type, nsamples=16, **UPDATE))
    tokens = calibration_sequences(tiny_tokenizer(), chosen, TEXT)
    with torch.no_grad():
        reference, plain, updated = (model.model(tokens).last_hidden_state for model in (dense, *models))
    assert (updated - reference).norm() < 0.8 * (plain - reference).norm()


@pytest.mark.parametrize("sparsity_type", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("method", ["neuronrank_wanda", "magnitude"])
def test_choosing_and_refitting_in_turn_is_closer_still(sparsity_type: str, method: str) -> None:
    dense = small(layers=1)
    chosen = recipe(method=method, sparsity_type=sparsity_type, nsamples=32, **UPDATE)
    models = [copy.deepcopy(dense) for _ in range(2)]
    pruned(models[0], chosen)
    pruned(models[1], recipe(method=method, sparsity_type=sparsity_type, nsamples=32, **GRADUAL))
    tokens = calibration_sequences(tiny_tokenizer(), chosen, TEXT)
    with torch.no_grad():
        reference, at_once, gradual = (model.model(tokens).last_hidden_state for model in (dense, *models))
    assert (gradual - reference).norm() < 0.95 * (at_once - reference).norm()


@pytest.mark.parametrize("update", [UPDATE, GRADUAL], ids=str)
def test_more_iterations_are_closer(update: dict[str, object]) -> None:
    dense = small(layers=1)
    tokens = calibration_sequences(tiny_tokenizer(), recipe(nsamples=32), TEXT)
    distances = []
    for iterations in (1, 4, 16):
        model = copy.deepcopy(dense)
        pruned(model, recipe(nsamples=32, update_iterations=iterations, **update))
        with torch.no_grad():
            distances.append((model.model(tokens)[0] - dense.model(tokens)[0]).norm().item())
    assert distances[0] > 1.1 * distances[1], distances
    assert distances[1] > 1.01 * distances[2], distances


def test_down_makes_up_for_what_gate_and_up_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = small(layers=1)
    chosen = recipe(nsamples=32, **UPDATE)
    tokens = calibration_sequences(tiny_tokenizer(), chosen, TEXT)
    models = [copy.deepcopy(dense) for _ in range(2)]
    pruned(models[0], chosen)
    fit_down_to_its_own_outputs(monkeypatch)
    pruned(models[1], chosen)
    with torch.no_grad():
        reference, aware, blind = (model.model(tokens).last_hidden_state for model in (dense, *models))
    assert (aware - reference).norm() < 0.98 * (blind - reference).norm()


@pytest.mark.parametrize("update", [UPDATE, GRADUAL], ids=str)
def test_dense_zeros_stay_zero(update: dict[str, object]) -> None:
    model = small()
    with torch.no_grad():
        linears(model, 0)["gate_proj"].weight[:, :26] = 0  # more than half, in every row
    before = zeros(model, 0)["gate_proj"]
    pruned(model, recipe(**update))
    assert zeros(model, 0)["gate_proj"][before].all()


def test_magnitude_needs_text_only_for_the_update() -> None:
    assert not needs_text(recipe(method="magnitude"))
    model = small()
    report = pruned(model, recipe(method="magnitude", **UPDATE))
    assert report.total.zeros == report.total.prunable // 2
    assert report.calibration.tokens == 6 * 32


def test_gram_and_target_are_sums_over_tokens() -> None:
    layer = resolve_layer(small().model.layers[0], 0)
    mlp, x = layer.module.mlp, torch.randn(3, 5, 32)
    with torch.no_grad():
        outputs = DenseOutputs(layer.mlp, torch.empty(3, 5, 32))
        with outputs:
            expected = torch.cat([mlp(x[:2]), mlp(x[2:])]).flatten(0, 1).double().numpy()
        mlp.gate_proj.weight[:, ::2] = 0
        seen = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        for _ in range(2):  # The outputs are there for every pass.
            with GramCollector(layer.blocks(), ("gate_proj", "down_proj"), outputs) as gram:
                mlp(x[:2])
                mlp(x[2:])
        mlp(x)  # no longer watched
    gram.sum_over(ALONE)
    h, rows = seen.flatten(0, 1).double().numpy(), x.flatten(0, 1).double().numpy()
    np.testing.assert_allclose(gram.gram["gate_proj"], rows.T @ rows, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gram.gram["down_proj"], h.T @ h, rtol=1e-4, atol=1e-7)
    assert gram.target is not None
    np.testing.assert_allclose(gram.target, expected.T @ h, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 20, 33])
def test_half_of_a_gram_matrix_mirrored_is_all_of_it(columns: int) -> None:
    rows = torch.randn(40, columns, dtype=torch.float64)
    gram = torch.zeros(columns, columns, dtype=torch.float64)
    add_gram(gram, rows[:25])
    add_gram(gram, rows[25:])
    np.testing.assert_allclose(mirrored(gram), rows.numpy().T @ rows.numpy(), rtol=1e-12, atol=1e-12)


def test_a_pass_for_down_alone_ends_there() -> None:
    layer = resolve_layer(small().model.layers[0], 0)
    called: list[torch.Tensor] = []
    layer.module.mlp.down_proj.register_forward_hook(lambda module, args, output: called.append(output))
    for stop, calls in ((False, 1), (True, 1)):
        with torch.no_grad(), GramCollector(layer.blocks(), ("down_proj",), stop=stop), suppress(StopForward):
            layer.module.mlp(torch.randn(1, 4, 32))
        assert len(called) == calls


def test_non_finite_inputs_name_the_layer() -> None:
    layer = resolve_layer(small().model.layers[0], 7)
    watching = GramCollector(layer.blocks(), ("down_proj",))
    with torch.no_grad(), watching, suppress(StopForward):
        layer.module.mlp(torch.full((1, 2, 32), float("nan")))
    with pytest.raises(NonFiniteError, match="layer 7"):
        watching.sum_over(ALONE)


def test_gradually_neurons_that_do_the_same_lose_more_than_those_that_nothing_replaces() -> None:
    share = {}
    for update in (UPDATE, GRADUAL):
        model = small()
        for layer in range(len(model.model.layers)):
            mlp = linears(model, layer)
            with torch.no_grad():
                for name in ("gate_proj", "up_proj"):
                    mlp[name].weight[1:8] = mlp[name].weight[0]
        pruned(model, recipe(method="wanda", propagate="dense", **update))
        gone = np.concatenate([zeros(model, layer)["down_proj"] for layer in range(len(model.model.layers))])
        share[update["update"]] = float(gone[:, :8].mean() - gone[:, 8:].mean())
    assert share["gradual"] > share["least-squares"] + 0.1, share
