"""Two models side by side against their own forwards in NumPy, and the laws of comparing a model with itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from tiny import BOS, tiny_model, tiny_tokenizer
from tokenizers import AddedToken

from neuronrank_core import InvalidValueError, NonFiniteError
from neuronrank_core.measures import Divergence
from neuronrank_torch.evaluation import windows as module
from neuronrank_torch.evaluation.divergence import IncomparableError, compare_predictions
from neuronrank_torch.evaluation.perplexity import Perplexity, evaluate
from neuronrank_torch.evaluation.windows import Evaluated, score_windows
from neuronrank_torch.model.streaming import StreamedModel
from neuronrank_torch.model.weights import LoadedWeights

TEXT = "The quick brown fox jumps over the lazy dog. " * 5
CUT: dict[str, Any] = {"seqlen": 19, "windows": 7}
FAMILIES = ["llama", "qwen3", "gemma3", "granite", "bitnet"]


def small(family: Any = "llama", **options: Any) -> Any:
    return tiny_model(family, layers=2, hidden=32, intermediate=64, **options)


def damaged(model: Any, seed: int = 1) -> Any:
    """The model with half of each MLP matrix zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp" in name and weight.ndim == 2:
                weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0.0
    return model


def streamed(model: Any, stage: str = "p") -> Evaluated:
    opened = StreamedModel(model, LoadedWeights(model), torch.device("cpu"))
    return Evaluated(opened.model, opened.resident, stage)


def compared(dense: Evaluated, model: Evaluated, **options: Any) -> tuple[Perplexity, Perplexity, Divergence]:
    tokenizers = tiny_tokenizer(True), tiny_tokenizer(True)
    return compare_predictions(dense, model, tokenizers, TEXT, **{**CUT, **options})


def by_hand(dense: Any, model: Any, bos: str = "window") -> tuple[float, float, float]:
    """Divergence of whole forward passes in float64; windows made from the tokenizer's ids."""
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    windows = [[BOS, *ids[18 * i : 18 * (i + 1)]] for i in range(7)]
    if bos == "text":
        windows = [[BOS, *ids][19 * i : 19 * (i + 1)] for i in range(7)]
    kl, same = [], []
    for window in windows:
        with torch.no_grad():
            a, b = (m(torch.tensor([window])).logits[0, :-1].double().numpy() for m in (dense, model))
        p, q = (np.exp(log_softmax(of_model, axis=-1)) for of_model in (a, b))
        kl += rel_entr(p, q).sum(-1).tolist()
        same += [top_a == top_b for top_a, top_b in zip(a.argmax(-1), b.argmax(-1), strict=True)]
    assert len(kl) == 7 * 18
    return float(np.mean(kl)), float(np.percentile(kl, 99)), float(np.mean(same))


def figures(found: Divergence) -> tuple[float, float, float]:
    return found.kl_mean, found.kl_p99, found.agreement


@pytest.mark.parametrize("bos", ["window", "text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_whole_forward_passes_in_float64(family: str, bos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAMED_TOKENS", 4 * 19)  # Blocks of 4 and 3 windows.
    monkeypatch.setattr(module, "_POSITIONS", 7)
    expected = by_hand(small(family), damaged(small(family)), bos)
    assert expected[0] > 1e-3
    assert 0 < expected[2] < 1
    before, after, found = compared(streamed(small(family)), streamed(damaged(small(family))), bos_mode=bos)
    assert figures(found) == pytest.approx(expected, rel=1e-4)
    # And each perplexity is bit for bit the one that is measured alone.
    for model, measured in ((small(family), before), (damaged(small(family)), after)):
        one = streamed(model)
        alone = evaluate(one.model, tiny_tokenizer(True), TEXT, **CUT, bos_mode=bos, resident=one.resident)
        assert measured == alone


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batches_and_streaming_change_nothing(batch_size: int) -> None:
    expected = figures(compared(Evaluated(small()), Evaluated(damaged(small())))[2])
    for dense, model in (
        (Evaluated(small()), Evaluated(damaged(small()))),
        (streamed(small()), streamed(damaged(small()))),
        (Evaluated(small()), streamed(damaged(small()))),
        (streamed(small()), Evaluated(damaged(small()))),
    ):
        assert figures(compared(dense, model, batch_size=batch_size)[2]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_and_itself_agree_exactly(dtype: torch.dtype) -> None:
    before, after, found = compared(streamed(small("gemma3").to(dtype)), streamed(small("gemma3").to(dtype)))
    assert before == after
    assert figures(found) == (0.0, 0.0, 1.0)


def test_models_of_different_precision_are_compared_in_float32() -> None:
    half = small().bfloat16()
    expected = by_hand(small(), half)
    assert figures(compared(streamed(small()), streamed(half))[2]) == pytest.approx(expected, rel=1e-3)
    assert 0 < expected[0] < 0.01


def test_the_direction_is_from_the_reference() -> None:
    dense, model = small(tied=False), damaged(small(tied=False))
    dense.lm_head.weight.data *= 3.0
    there, back = by_hand(dense, model), by_hand(model, dense)
    assert there[0] != pytest.approx(back[0], rel=0.1)
    assert figures(compared(Evaluated(dense), Evaluated(model))[2]) == pytest.approx(there, rel=1e-4)


def test_what_a_model_does_with_its_logits_is_left_to_it() -> None:
    dense, model = small("gemma3"), small("gemma3")
    model.config.final_logit_softcapping = 3.0
    expected = by_hand(dense, model)
    assert expected[0] > 0.01
    assert figures(compared(streamed(dense), streamed(model))[2]) == pytest.approx(expected, rel=1e-4)


def test_no_layer_is_in_memory_beside_another() -> None:
    opened = [StreamedModel(m, LoadedWeights(m), torch.device("cpu")) for m in (small(tied=False), small(tied=False))]
    inside: list[int] = []

    def in_memory(*_: Any) -> None:
        layers = [each for one in opened for each in one.decoder.layers]
        inside.append(sum(not any(p.is_meta for p in each.module.parameters()) for each in layers))

    for one in opened:
        for layer in one.decoder.layers:
            layer.module.register_forward_pre_hook(in_memory)
    compared(*(Evaluated(one.model, one.resident) for one in opened))
    assert inside
    assert set(inside) <= {0, 1}


def test_progress_counts_the_layers_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAMED_TOKENS", 4 * 19)
    seen: list[Any] = []
    compared(streamed(small(), "a"), streamed(small(), "b"), progress=lambda *step: seen.append(step))
    stages = ["a: layer 1 of 2", "a: layer 2 of 2", "b: layer 1 of 2", "b: layer 2 of 2", "b: output head"]
    done = [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert seen == [(stage, step, 8, "layers") for stage, step in zip(2 * stages, done, strict=True)]


def test_modes_are_restored() -> None:
    models = small().train(), small().train()
    compared(*map(Evaluated, models))
    assert all(part.training for model in models for part in model.modules())


def test_models_that_do_not_predict_the_same_tokens() -> None:
    other = tiny_tokenizer(True)
    other.add_tokens([AddedToken("fox", normalized=False)])
    pair = Evaluated(small()), Evaluated(small())
    with pytest.raises(IncomparableError, match="1 tokens of their vocabularies differ"):
        compare_predictions(*pair, (tiny_tokenizer(True), other), TEXT, **CUT)
    with pytest.raises(IncomparableError, match="their tokenizers split the text differently"):
        compare_predictions(*pair, (tiny_tokenizer(True), tiny_tokenizer(False)), TEXT, **CUT)
    with pytest.raises(IncomparableError, match="they predict 258 and 320 tokens"):
        compared(Evaluated(small()), Evaluated(small(vocab=320)))


def test_a_divergence_that_is_not_finite_names_the_window() -> None:
    model = small(tied=False)
    unlikely = model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([257]), -torch.inf)
    )
    windows = np.full((2, 8), 5)
    with pytest.raises(NonFiniteError, match="KL divergence is not finite in window 0"):
        score_windows([Evaluated(small(tied=False)), Evaluated(model)], windows)
    assert score_windows([Evaluated(model), Evaluated(small(tied=False))], windows)[0].kl is not None
    unlikely.remove()


def test_batch_size_out_of_range() -> None:
    with pytest.raises(InvalidValueError, match="batch_size"):
        compared(Evaluated(small()), Evaluated(small()), batch_size=0)


def test_which_of_the_two_models_is_not_finite() -> None:
    windows = np.arange(12)[None] % 7
    for broken, says in ((0, "the reference's"), (1, "the model's")):
        pair = [small(tied=False), small(tied=False)]
        pair[broken].lm_head.weight.data.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match=says):
            score_windows([Evaluated(one) for one in pair], windows)
