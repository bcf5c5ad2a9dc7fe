"""Perplexity against sums made by hand, and its promises on memory, mode and errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import sem
from tiny import BOS, VOCAB, tiny_model, tiny_tokenizer
from tiny_types import tiny_type

from neuronrank_core.errors import InputError, NonFiniteError
from neuronrank_torch.evaluation import windows as module
from neuronrank_torch.evaluation.perplexity import Perplexity, evaluate, perplexity
from neuronrank_torch.model.streaming import StreamedModel
from neuronrank_torch.model.weights import LoadedWeights

TEXT = "The quick brown fox jumps over the lazy dog. " * 5


def small(family="llama", **options):
    return tiny_model(family, layers=2, hidden=32, intermediate=64, **options)


def random_windows(count=3, seqlen=24, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, size=(count, seqlen))


def nll_by_hand(model, windows):
    """Mean of -log softmax, in NumPy and float64, one position at a time."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(torch.tensor(window)[None]).logits[0].double().numpy()
        for position in range(len(window) - 1):
            row = logits[position]
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[window[position + 1]])
    return np.mean(losses)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_equals_a_loop_in_float64(family):
    model, windows = small(family), random_windows()
    result = perplexity(model, windows)
    expected = nll_by_hand(model, windows)
    assert result.nll == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert (result.predicted_tokens, result.windows, result.seqlen, result.bos) == (3 * 23, 3, 24, None)


def test_the_standard_error_is_that_over_windows():
    model, windows = small("granite"), random_windows(5)
    of_windows = [nll_by_hand(model, window[None]) for window in windows]
    result = perplexity(model, windows)
    assert result.standard_error == pytest.approx(result.perplexity * sem(of_windows), rel=1e-5)
    assert perplexity(model, windows[:1]).standard_error is None


def test_equals_the_loss_of_transformers():
    model, windows = small(), torch.from_numpy(random_windows())
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    assert perplexity(model, windows.numpy()).nll == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_a_layer_at_a_time_is_the_same(family, tied, monkeypatch):
    model, windows = small(family, tied=tied), random_windows(7)
    expected = perplexity(model, windows, batch_size=2)
    monkeypatch.setattr(module, "STREAMED_TOKENS", 3 * 24)
    streamed = StreamedModel(model, LoadedWeights(model), torch.device("cpu"))
    seen = []
    result = perplexity(
        model, windows, batch_size=2, resident=streamed.resident, progress=lambda *step: seen.append(step), stage="p"
    )
    assert result.nll == pytest.approx(expected.nll, rel=1e-6)
    assert (result.windows, result.predicted_tokens) == (7, 7 * 23)
    # Blocks of 4 and 3 windows through 2 layers and the head.
    stages = ["p: layer 1 of 2", "p: layer 2 of 2", "p: output head"]
    assert seen == [(s, done, 4, "layers") for s, done in zip(2 * stages, [0, 1, 2, 2, 3, 4], strict=True)]


@pytest.mark.parametrize("name", ["gemma4_text", "glm_moe_dsa", "zaya"])
def test_what_does_not_run_a_layer_at_a_time_runs_as_a_whole(name):
    model, windows = tiny_type(name).eval(), random_windows(5)
    expected = nll_by_hand(model, windows)
    streamed = StreamedModel(model, LoadedWeights(model), torch.device("cpu"))
    assert perplexity(model, windows, resident=streamed.resident).nll == pytest.approx(expected, rel=1e-5)
    assert next(streamed.decoder.layers[0].module.parameters()).is_meta


def test_what_a_model_does_with_its_logits_is_left_to_it():
    model, windows = small("gemma3"), random_windows()
    plain = perplexity(model, windows).nll
    model.config.final_logit_softcapping = 0.1
    capped = perplexity(model, windows).nll
    streamed = StreamedModel(model, LoadedWeights(model), torch.device("cpu"))
    assert perplexity(model, windows, resident=streamed.resident).nll == pytest.approx(capped, rel=1e-6)
    assert capped != pytest.approx(plain, rel=1e-3)


def test_uniform_logits_give_the_vocabulary_size():
    model = small(tied=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, random_windows()).perplexity == pytest.approx(VOCAB, rel=1e-6)


def test_more_positions_than_fit_in_memory_at_a_time(monkeypatch):
    model, windows = small(), random_windows()
    whole = perplexity(model, windows)
    monkeypatch.setattr(module, "_POSITIONS", 7)
    assert perplexity(model, windows).nll == pytest.approx(whole.nll, rel=1e-12)


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_batches_change_nothing(batch_size):
    model, windows = small(), random_windows(5)
    one = perplexity(model, windows)
    assert perplexity(model, windows, batch_size=batch_size).nll == pytest.approx(one.nll, rel=1e-6)


def test_half_precision_logits_are_summed_in_float32():
    model, windows = small().bfloat16(), random_windows()
    assert perplexity(model, windows).nll == pytest.approx(nll_by_hand(model, windows), rel=1e-6)


def test_progress_counts_windows():
    seen = []
    perplexity(small(), random_windows(5), batch_size=2, progress=lambda *step: seen.append(step))
    assert seen == [("perplexity", done, 5, "windows") for done in (0, 2, 4, 5)]


def test_mode_is_restored_module_by_module():
    model = small().train()
    model.model.layers[1].eval()
    before = [part.training for part in model.modules()]
    assert len(set(before)) == 2
    inside = []
    model.lm_head.register_forward_hook(lambda *_: inside.append((model.training, torch.is_inference_mode_enabled())))
    perplexity(model, random_windows(1))
    assert inside == [(False, True)]
    assert [part.training for part in model.modules()] == before


def test_no_cache_is_kept():
    caches = []
    model = small()
    model.register_forward_hook(lambda *step: caches.append(step[-1].past_key_values))
    perplexity(model, random_windows(1))
    assert caches == [None]


def test_mode_is_restored_after_an_error():
    model = small().train()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        perplexity(model, random_windows(1))
    assert all(part.training for part in model.modules())


def test_non_finite_names_the_window():
    model, windows = small(tied=False), random_windows(3) % 200
    windows[1:, 5] = 250
    model.model.embed_tokens.weight.data[250] = float("inf")
    with pytest.raises(NonFiniteError, match="not finite in window 1"):
        perplexity(model, windows, batch_size=3)


def test_overflow_is_an_error():
    model = small(tied=False)
    model.lm_head.weight.data.mul_(1e5)
    with pytest.raises(NonFiniteError, match="overflows"):
        perplexity(model, random_windows())


def test_tokens_of_another_vocabulary():
    windows = random_windows()
    windows[0, 0] = VOCAB
    with pytest.raises(InputError, match=f"token {VOCAB} is outside the model's vocabulary of {VOCAB}"):
        perplexity(small(), windows)


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_nothing_to_predict(shape):
    with pytest.raises(InputError, match="shape of windows"):
        perplexity(small(), np.zeros(shape, dtype=np.int64))


def test_batch_size_out_of_range():
    with pytest.raises(InputError, match="batch_size"):
        perplexity(small(), random_windows(), batch_size=0)


class TestEvaluate:
    def test_bos_begins_every_window_and_is_no_target(self):
        model, tokenizer = small(), tiny_tokenizer(True)
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        expected = nll_by_hand(model, [[BOS, *ids[:15]], [BOS, *ids[15:30]]])
        result = evaluate(model, tokenizer, TEXT, seqlen=16, windows=2)
        assert result.nll == pytest.approx(expected, rel=1e-6)
        assert (result.bos, result.predicted_tokens) == ("window", 30)

    def test_bos_begins_the_text(self):
        model, tokenizer = small(), tiny_tokenizer(True)
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        expected = nll_by_hand(model, [[BOS, *ids[:15]], ids[15:31]])
        result = evaluate(model, tokenizer, TEXT, seqlen=16, windows=2, bos_mode="text")
        assert result.nll == pytest.approx(expected, rel=1e-6)
        assert result.bos == "text"

    def test_no_bos_and_all_windows(self):
        result = evaluate(small(), tiny_tokenizer(False), TEXT, seqlen=50)
        assert (result.bos, result.windows) == (None, len(TEXT) // 50)


def test_to_dict_is_json():
    result = Perplexity(1.5, 0.4, 30, 2, 16, "window", 0.2)
    assert json.loads(json.dumps(result.to_dict())) == {
        "perplexity": 1.5,
        "nll": 0.4,
        "predicted_tokens": 30,
        "windows": 2,
        "seqlen": 16,
        "bos": "window",
        "standard_error": 0.2,
    }
