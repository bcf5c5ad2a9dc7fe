"""Experts are pruned each for itself: exact counts, own tokens, magnitude where they are few."""

from __future__ import annotations

import copy

import pytest
import torch
from mixture import MOE, experts_of, inputs, mixture, recipe, scores, tables, weights_of
from pruning import disagreements, pruned, same_state, state, with_layer_of
from torch import nn

from neuronrank_torch import Report
from neuronrank_torch.pruning import layer as pruning_layer

RATIO = 0.37
NAMES = ("gate_proj", "up_proj", "down_proj")


def zeros(model: nn.Module, layer: int, expert: int) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(w == 0) for name, w in weights_of(model, layer, expert).items()}


def everyone_fed(monkeypatch: pytest.MonkeyPatch, minimum: int = 1) -> None:
    monkeypatch.setattr(pruning_layer, "MINIMUM_TOKENS", minimum)


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_every_expert_loses_its_own_share(family: str, method: str) -> None:
    model = mixture(family)
    report = pruned(model, recipe(method=method, sparsity_ratio=RATIO, include_attention=True))
    reported = dict(report.layers[0].modules)
    for expert in range(len(experts_of(model, 0).down_proj)):
        for name, gone in zeros(model, 0, expert).items():
            rows, columns = gone.shape
            whole, by_row = int(RATIO * gone.numel()), rows * int(RATIO * columns)
            starved = any(f" {expert} (" in note for note in report.notes if "layer 0" in note)
            assert gone.sum() == (whole if method == "magnitude" or starved else by_row)
            assert reported.pop(f"experts.{expert}.{name}").zeros == gone.sum()
    assert list(reported) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert all(m.zeros > 0 for m in reported.values())


def test_patterns_hold_in_every_expert() -> None:
    model = mixture("mixtral")
    pruned(model, recipe(sparsity_type="2:4"))
    for fused in (experts_of(model, 1).gate_up_proj, experts_of(model, 1).down_proj):
        assert ((fused == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_layers_without_experts_are_pruned_and_reported() -> None:
    model = mixture("qwen3_moe", layers=3)
    report = pruned(model, recipe())
    assert list(report.layers[1].modules) == list(NAMES)
    assert all((getattr(model.model.layers[1].mlp, name).weight == 0).float().mean() == 0.5 for name in NAMES)
    assert next(iter(report.layers[2].modules)) == "experts.0.gate_proj"
    assert report.layers[2].sum("zeros") == report.layers[0].sum("zeros") > 0


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("chosen", [{}, {"method": "neuronrank_tfidf", "idf_exp": 0.0, "spikiness_exp": 1.0}])
def test_scores_are_those_of_the_routed_tokens(family: str, chosen: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    everyone_fed(monkeypatch)
    dense, options = mixture(family), recipe(**chosen)
    model = copy.deepcopy(dense)
    assert pruned(model, options).notes == ()
    checked = 0
    for expert, name, score in scores(dense, 0, options):
        assert disagreements(zeros(model, 0, expert)[name].numpy(), score, name, options) == 0
        checked += 1
    assert checked == 3 * len(experts_of(model, 0).down_proj)


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_routing_follows_what_the_layers_before_hand_on(propagate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    everyone_fed(monkeypatch)
    dense, options = mixture("mixtral"), recipe(propagate=propagate, sparsity_ratio=0.7)
    model = copy.deepcopy(dense)
    pruned(model, options)
    # Layer 1 saw what layer 0 gave, pruned or not, with its own weights as they were.
    before = with_layer_of(model, dense, 1) if propagate == "pruned" else dense
    other = dense if propagate == "pruned" else with_layer_of(model, dense, 1)
    counts = [
        {e: t.tokens.sum() for e, t in tables(m, 1, inputs(m, 1, options), options).items()} for m in (before, other)
    ]
    assert counts[0] != counts[1]
    for expert, name, score in scores(before, 1, options):
        assert disagreements(zeros(model, 1, expert)[name].numpy(), score, name, options) == 0


def by_hand(dense: nn.Module, options: object) -> dict[int, int]:
    """Tokens that each expert of the first layer sees."""
    found = tables(dense, 0, inputs(dense, 0, options), options)
    return {e: int(found[e].tokens.sum()) if e in found else 0 for e in range(len(experts_of(dense, 0).down_proj))}


def starved_run(dense: nn.Module, options: object) -> tuple[nn.Module, nn.Module, Report]:
    """The model pruned, the model pruned by magnitude, and the first one's report."""
    model, magnitude = copy.deepcopy(dense), copy.deepcopy(dense)
    report = pruned(model, options)
    pruned(magnitude, recipe(method="magnitude", sparsity_ratio=RATIO))
    return model, magnitude, report


@pytest.mark.parametrize("method", ["neuronrank_wanda", "wanda"])
def test_an_expert_with_few_tokens_gets_the_mask_of_magnitude(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, options = mixture("qwen3_moe"), recipe(method=method, sparsity_ratio=RATIO)
    tokens = by_hand(dense, options)
    enough = sorted(tokens.values())[3]
    few = {expert: n for expert, n in tokens.items() if n < enough}
    assert 0 < len(few) < len(tokens)
    everyone_fed(monkeypatch, enough)
    model, magnitude, report = starved_run(dense, options)
    for expert in tokens:
        ours, theirs = zeros(model, 0, expert), zeros(magnitude, 0, expert)
        assert all(torch.equal(ours[name], theirs[name]) for name in NAMES) == (expert in few)
    assert report.notes[0] == (
        "layer 0: these experts received too few calibration tokens (in brackets) and are pruned by magnitude: "
        + ", ".join(f"{expert} ({n})" for expert, n in few.items())
    )


def test_an_expert_that_is_never_chosen_gets_the_mask_of_magnitude(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone_fed(monkeypatch)
    dense, options = mixture("qwen3_moe"), recipe(method="wanda", sparsity_ratio=RATIO, nsamples=1, seqlen=2)
    never = [expert for expert, n in by_hand(dense, options).items() if n == 0]
    assert never
    model, magnitude, report = starved_run(dense, options)
    for expert in never:
        ours, theirs = zeros(model, 0, expert), zeros(magnitude, 0, expert)
        assert all(torch.equal(ours[name], theirs[name]) for name in NAMES)
    assert report.notes[0].endswith(": " + ", ".join(f"{expert} (0)" for expert in never))


def test_fewer_tokens_than_topics_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone_fed(monkeypatch)
    dense = mixture("qwen3_moe")
    options = recipe(method="neuronrank_tfidf", tfidf_mode="topic", sparsity_ratio=RATIO, nsamples=2, tfidf_k=12)
    sampled = {e: int(t.sample_tokens.sum()) for e, t in tables(dense, 0, inputs(dense, 0, options), options).items()}
    few = [e for e, n in sorted(sampled.items()) if n < 12]
    assert 0 < len(few) < 6
    model, magnitude, _ = starved_run(dense, options)
    for expert in range(6):
        same = torch.equal(zeros(model, 0, expert)["gate_proj"], zeros(magnitude, 0, expert)["gate_proj"])
        assert same == (expert in few)


def test_weights_alone_need_no_tokens() -> None:
    model, again = mixture("mixtral"), mixture("mixtral")
    assert pruned(model, recipe(method="magnitude")).notes == ()
    pruned(again, recipe(method="magnitude"), text="")
    assert same_state(state(model), state(again))
