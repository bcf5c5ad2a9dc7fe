"""Readers of the older format find the rotary position embeddings that transformers 5 uses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tiny import tiny_config, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BambaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
)

from neuronrank_torch.saving import older_readers
from neuronrank_torch.saving.older_readers import add_older_keys, rename_tokenizer

THETA, LOCAL = 54321.0, 321.0
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
KINDS: dict[str, Any] = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": THETA},
    "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL},
}
THETAS = {"full_attention": THETA, "sliding_attention": LOCAL}
OLDER = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rotary_emb_base", "rotary_pct")
OLDER += ("global_rope_theta", "local_rope_theta")


def gemma(rope: dict[str, Any]) -> PreTrainedConfig:
    config = tiny_config("gemma3", layers=6)
    config.rope_parameters = rope
    return config


#: Configurations, and what transformers 4 reads for them.
CASES: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "plain": (LlamaConfig(rope_parameters={"rope_theta": THETA, "rope_type": "default"}), {"rope_theta": THETA}),
    "scaled": (
        LlamaConfig(rope_parameters={"rope_theta": THETA, **YARN}),
        {"rope_theta": THETA, "rope_scaling": YARN},
    ),
    "of a part of a head": (
        PhiConfig(rope_parameters={"rope_theta": THETA, "rope_type": "default", "partial_rotary_factor": 0.3}),
        {"rope_theta": THETA, "partial_rotary_factor": 0.3},
    ),
    "other names": (
        GPTNeoXConfig(rope_parameters={"rope_theta": THETA, "rope_type": "default", "partial_rotary_factor": 0.3}),
        {"rotary_emb_base": THETA, "rotary_pct": 0.3},
    ),
    "by kind of layer": (
        gemma(KINDS),
        {
            "rope_theta": THETA,
            "rope_local_base_freq": LOCAL,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "by kind of layer, other names": (
        AutoConfig.for_model(
            "modernbert-decoder",
            rope_parameters={name: {"rope_type": "default", "rope_theta": theta} for name, theta in THETAS.items()},
        ),
        {"global_rope_theta": THETA, "local_rope_theta": LOCAL},
    ),
    "positions in sections": (
        LlamaConfig(rope_parameters={"rope_theta": THETA, "rope_type": "default", "mrope_section": [2, 1, 1]}),
        {"rope_theta": THETA, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    ),
    "three entries alone": (
        Phi3Config(
            hidden_size=32,
            num_attention_heads=4,
            original_max_position_embeddings=64,
            rope_parameters={
                "rope_theta": THETA,
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
        ),
        {
            "rope_theta": THETA,
            "partial_rotary_factor": 1.0,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        },
    ),
    "an infinite number beside it": (
        BambaConfig(rope_parameters={"rope_theta": THETA, "rope_type": "default"}, time_step_limit=(0.0, math.inf)),
        {"rope_theta": THETA, "partial_rotary_factor": 0.5},
    ),
    "none": (GPT2Config(), {}),
}


def saved(config: PreTrainedConfig, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What transformers writes, and the same with the older keys."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    before = json.loads(file.read_text("utf-8"))
    add_older_keys(config, file)
    return before, json.loads(file.read_text("utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_older_keys_are_added_and_nothing_else_changes(name: str, tmp_path: Path) -> None:
    config, expected = CASES[name]
    before, after = saved(config, tmp_path)
    assert {key: value for key, value in after.items() if key in OLDER} == expected
    assert {key: value for key, value in after.items() if key not in OLDER} == before
    read = AutoConfig.from_pretrained(tmp_path).to_dict().get("rope_parameters") or {}
    assert {key: value for key, value in read.items() if key != "type"} == before.get("rope_parameters", {})


def test_a_text_model_inside_another_one_has_its_keys(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gemma3", text_config=gemma(KINDS).to_dict())
    _, after = saved(config, tmp_path)
    assert (after["text_config"]["rope_theta"], after["text_config"]["rope_local_base_freq"]) == (THETA, LOCAL)
    assert "rope_theta" not in after


@pytest.mark.parametrize(
    "wrong", [{"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"rope_scaling": {"rope_type": "yarn"}}]
)
def test_keys_that_would_change_the_model_are_not_added(wrong: dict[str, Any], tmp_path: Path) -> None:
    config, _ = CASES["plain"]
    with patch.object(older_readers, "older_keys", lambda rope: wrong):
        before, after = saved(config, tmp_path)
    assert after == before


def test_a_tokenizer_has_names_that_both_versions_know(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>", "<y>"]})
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    rename_tokenizer(tokenizer, file)
    content = json.loads(file.read_text("utf-8"))
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert content["additional_special_tokens"] == ["<x>", "<y>"]
    assert "extra_special_tokens" not in content
    assert content["model_input_names"] == ["input_ids", "attention_mask"]
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again("a<x>b").input_ids == tokenizer("a<x>b").input_ids
