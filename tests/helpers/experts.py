"""Tiny mixtures of experts of every layout: groups, corrections, biases, shared experts, dense layers."""

from __future__ import annotations

from typing import Any

from tiny import BOS, EOS, VOCAB
from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 20,
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
NARROW = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
GROUPED = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8}
#: The configuration of each family, and the name of the number of experts in it.
FAMILIES: dict[str, tuple[PreTrainedConfig, str]] = {
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2), "num_local_experts"),
    # One layer with an ordinary MLP.
    "qwen3_moe": (
        Qwen3MoeConfig(**SIZES, **NARROW, num_experts=6, norm_topk_prob=True, mlp_only_layers=[1]),
        "num_local_experts",
    ),
    # A shared expert; gates that do not add up to one.
    "qwen2_moe": (
        Qwen2MoeConfig(**SIZES, **NARROW, num_experts=6, shared_expert_intermediate_size=6, norm_topk_prob=False),
        "num_experts",
    ),
    "olmoe": (OlmoeConfig(**SIZES, num_experts=7, num_experts_per_tok=3, norm_topk_prob=False), "num_experts"),
    # Two groups, a correction of the scores, a shared expert, a dense layer.
    "deepseek": (
        DeepseekV3Config(**SIZES | {"num_key_value_heads": 4, "head_dim": 4}, **NARROW, **GROUPED, **LATENT),
        "n_routed_experts",
    ),
    "glm4_moe": (
        Glm4MoeConfig(**SIZES, **NARROW, **GROUPED | {"n_group": 1, "n_routed_experts": 5}),
        "n_routed_experts",
    ),
    # Biases of the router and of the experts, clamps.
    "gpt_oss": (
        GptOssConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2, sliding_window=16),
        "num_local_experts",
    ),
}
