"""A tiny random model of any type of transformers, made from its configuration's defaults by shrinking every size."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

#: Every type, sorted.
TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
#: Parts that a type has only where its configuration says so: by "type+name", fields as in OVERRIDES.
VARIANTS: dict[str, Any] = {
    "cohere2_moe+shared": {"num_shared_experts": 1},
    "doge+experts": {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe+unshared": {"moe_num_shared_experts": 0},
    "gemma4_text+experts": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
    },
    "gemma3+bidirectional": {"text_config": {"use_bidirectional_attention": True}},
    "granitemoehybrid+dense": {"num_local_experts": 0},
    "granitemoeshared+unshared": {"shared_intermediate_size": 0},
    "llama+biases": {"mlp_bias": True, "attention_bias": True},
    "qwen3_moe+dense": {"mlp_only_layers": [0]},
    "stablelm+parallel": {"use_parallel_residual": True, "qk_layernorm": True},
}
VOCAB, HIDDEN, NEURONS, HEADS, HEAD, LAYERS = 300, 64, 96, 4, 16, 2
#: No token of the tiny tokenizer, for pictures and sound.
SPECIAL = 260

#: What a number is at most, by the name of its field; the first that matches counts.
MOST = [
    (r"(vision_|audio_)?(vocab_size|vocab_size_per_layer_input|decoder_vocab_size|unpadded_vocab_size)", VOCAB),
    (
        r"num_attention_heads|n_heads?|num_heads|attention_heads|(en|de)coder_attention_heads|swa_num_attention_heads",
        HEADS,
    ),
    (r"num_(en|de)coder_attention_heads|num_sliding_attention_heads|linear_num_(value_)?heads|index_n_heads", HEADS),
    (r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads|linear_num_key_heads|num_global_key_value_heads", 2),
    (
        r"(swa_|global_|index_|linear_(key_|value_)?|attention_)?head_dim|head_size|kv_channels|d_kv|d_head|dim_head",
        HEAD,
    ),
    (r"attention_head_size|resampler_head_dim|qk_head_dim|lightning_head_dim", HEAD),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", HEAD // 2),
    (r"v_head_dim", HEAD // 2),
    (r"(q|kv|o)_lora_rank|time_step_rank|mamba_dt_rank|laurel_rank|hc_lowrank|adapter_rank|d_rel", 16),
    (
        r"n_inner|dff|dim_ff|d_ff|d_inner|(encoder_|decoder_)?ffn_dim|intermediate_size(_mlp)?|inner_dim|feed_forward_size",
        NEURONS,
    ),
    (r"(expert_)?ffn_hidden_size|dense_intermediate_size|feedforward_dim|mlp_dim|mlp_hidden_size", NEURONS),
    (r"moe_.*intermediate_size|shared_.*intermediate_size|share_expert_dim|moe_dim", NEURONS // 2),
    (r"intermediate_size.*|.*_intermediate_size", NEURONS),
    (r"(mamba_)?(n_)?(ssm_)?(d_state|state_size)|mamba_d_ssm", 16),
    (r"(.*_)?hidden_size|(.*_)?hidden_dim|d_model|n_embd|embed_dim|emb_dim|dim|embedding_(dim|size)|dim_model", HIDDEN),
    (r".*_embedding_size|hidden_size_.*|word_embed_proj_dim|lru_width|projection_dim|(image|text)_.*_dim", HIDDEN),
    (
        r"(projector_|projection_)(hidden_size|input_dim|output_dim|hidden_dim)|.*_output_dim|output_dim|ple_embed_dim",
        HIDDEN,
    ),
    (r"hidden_size_per_layer_input", 16),
    (
        r"num_hidden_layers|n_layers?|(num_)?(en|de)coder_layers|num_layers|depth|layers|num_blocks|.*num_hidden_layers",
        LAYERS,
    ),
    (r"num_layers_per_stack|num_global_layers|num_lstm_layers|resampler_depth|num_nextn_predict_layers", 1),
    (r"n(um)?_(local_|routed_)?experts|moe_num_experts|num_routed_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|experts_per_token|num_selected_experts|router_top_k", 2),
    (r"n_group|num_expert_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_kv_shared_layers", 1),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|context_length|max_sequence_length",
        256,
    ),
    (r"max_seq_len(gth)?|seq_length|seq_len|max_seq_length|(text_)?max_length|max_target_len|model_max_length", 256),
    (r"original_max_position_embeddings", 128),
    (r"(mamba_)?chunk_size|attention_chunk_size|(text_)?block_size|lsh_attn_chunk_length|local_attn_chunk_length", 8),
    (r".*sliding_window(_size)?|window_size|attention_window_size|local_attention(_window_len)?|keep_window_size", 8),
    (r"index_topk|index_block_size|index_kpool|index_topk_blocks", 8),
    (r"(mamba_)?n_groups|mamba_ngroups", 1),
    (r"num_query_tokens|latent_query_num|resampler_n(um)?_latents|num_centroids|num_embeddings|codebook_size", 32),
    (r"ngram_vocab_size_base|encoder_hash_byte_group_vocab", 512),
]

Changes = dict[str, Any]
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
_ZAMBA = {"attention_hidden_size": 128, "attention_head_dim": 32}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "output_gate_type": "silu",
}
_MROPE = {"text_config": {"rope_parameters": {"mrope_section": [4, 2, 2]}}}
#: What a type needs besides: fields of its configuration, those of a part of it under the part's name. What is under
#: "first" is said before everything is shrunk, and `...` removes a field.
OVERRIDES: dict[str, Changes] = {
    "bamba": _MAMBA2 | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA2,
    "granite": _MULTIPLIERS,
    "granitemoe": _MULTIPLIERS,
    "granitemoeshared": _MULTIPLIERS | {"shared_intermediate_size": 48},
    "granitemoe_swa": {"shared_intermediate_size": 48},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "falcon_h1": {
        **{f"{name}_multiplier": 0.7 for name in ("embedding", "lm_head", "key", "attention_in", "attention_out")},
        "ssm_in_multiplier": 0.8,
        "ssm_out_multiplier": 1.2,
        "mlp_multipliers": [0.7, 1.3],
        "ssm_multipliers": [0.8, 0.9, 1.1, 1.2, 1.3],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_ssm": 128,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "chameleon": {"vocabulary_map": {"<image>": 299, **{f"IMGIMG{c}Z": 260 + i for i, c in enumerate("ABCDE")}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [1]}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    },
    "dots3_note": {
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}, "moe_intermediate_size": [48, 48]}
    },
    "flint": {"mlp_only_layers": [0]},
    "glm5_next": {"text_config": {"num_key_value_heads": HEADS}},
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [2, 1, 1]}}},
    "glm_ocr": _MROPE,
    "glmga": _MROPE,
    "paddleocr_vl": _MROPE,
    "qwen2_5_omni_thinker": _MROPE,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "4/8"},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "hunyuan_vl": {"text_config": {"head_dim": HEAD, "rope_parameters": {"xdrope_section": [2, 2, 2, 2]}}},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "ministral": {"head_dim": HEAD},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [4, 4]},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], **_ZAMBA},
    "zamba2": {"mamba_headdim": 16, "hybrid_layer_ids": [1], "attention_hidden_size": 128, "attention_head_dim": 32},
    "gemma4_assistant": {
        "first": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
        "text_config": {"num_kv_shared_layers": 2},
    },
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
}


def base(name: str) -> str:
    """The type of a type or a variant."""
    return name.partition("+")[0]


def tiny_type(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model: float32, CPU, eval mode; biases and gains are far from what they start as."""
    config, model_type = tiny_type_config(name), base(name)
    auto = AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if model_type in ("musicgen", "musicgen_melody"):  # The model for text is a part of what the type configures.
            model = auto._model_mapping[type(config)](config.decoder)
        else:
            model = auto.from_config(config, dtype=torch.float32)
        randomise(model)
    return model.eval()


def randomise(model: Any) -> None:
    """Matrices keep activations of order one; vectors move away from zeros and ones."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            noise = torch.randn(parameter.shape, dtype=parameter.dtype)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.5 * noise)
            elif isinstance(module, Conv1D):
                parameter.copy_(noise / math.sqrt(parameter.shape[0]))
            elif isinstance(module, nn.Linear) or "expert" in type(module).__name__.lower():
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            elif not parameter.isfinite().all() or parameter.abs().max() > 1e4:
                parameter.copy_(0.1 * noise)  # Never initialised.
    model.tie_weights()


def tiny_type_config(name: str) -> Any:
    """The configuration of :func:`tiny_type`."""
    model_type = base(name)
    kind = CONFIG_MAPPING[model_type]
    first = OVERRIDES.get(model_type, {}).get("first", {})
    default = kind(**first).to_dict()
    shrunk = _shrunk(default)
    if "is_decoder" in shrunk and not shrunk.get("is_encoder_decoder"):
        shrunk["is_decoder"] = True
    _merge(shrunk, {k: v for k, v in OVERRIDES.get(model_type, {}).items() if k != "first"})
    _merge(shrunk, VARIANTS.get(name, {}))
    return kind.from_dict(shrunk)


def _merge(into: dict[str, Any], changes: Changes) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        elif value is ...:
            into.pop(name, None)
        else:
            into[name] = value


_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "decoder_layers", "num_blocks")
_LEFT = ("id2label", "label2id", "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path")


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    depth = next((config[name] for name in _DEPTHS if isinstance(config.get(name), int)), 0)
    kept = _kept_layers(config, depth)
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in _LEFT:
            continue
        if name in _DEPTHS and value == depth:
            small[name] = len(kept)
        elif name == "per_layer_config" and isinstance(value, dict):
            own = {int(layer): changes for layer, changes in value.items()}
            small[name] = {new: _shrunk(own[old]) for new, old in enumerate(kept) if old in own}
        elif _per_layer(value, depth):
            small[name] = (
                [_as_layer(value[i], depth, kept) for i in kept] if value != [*range(depth)] else [*range(len(kept))]
            )
        else:
            small[name] = _small(name, value, len(kept) or LAYERS)
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = HEADS
    if config.get("qk_rope_head_dim") and config.get("head_dim") == config["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]  # Another name for it.
    rope = small.get("rope_parameters")
    if isinstance(rope, dict):
        _shrink_sections(rope, small)
    return small


def _per_layer(value: Any, depth: int) -> bool:
    return depth > 2 and isinstance(value, list) and len(value) == depth


def _as_layer(value: Any, depth: int, kept: list[int]) -> Any:
    """An item of a list that is as long as the model is deep."""
    return min(value, len(kept) - 1) if type(value) is int and 2 < value < depth else value


def _kept_layers(config: dict[str, Any], depth: int) -> list[int]:
    """Layers enough to have every kind that a list by layer names, in their order."""
    if not depth:
        return []
    kept: set[int] = set()
    for name, value in config.items():
        if _per_layer(value, depth) and ("type" in name or "pattern" in name) and len({map(str, value)}) < 9:
            kept |= {next(i for i, v in enumerate(value) if v == kind) for kind in _unique(value)}
    for extra in range(depth):
        if len(kept) >= min(LAYERS, depth):
            break
        kept.add(extra)
    return sorted(kept)


def _unique(values: list[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found[:6]


def _small(name: str, value: Any, layers: int) -> Any:
    if isinstance(value, dict):
        return _shrunk(value)
    if isinstance(value, list):
        if re.search(r"(layers|indexes|indices|idxs|layer_ids)$", name) and all(type(v) is int for v in value):
            return [v for v in value if v < layers] or value[:0] if value else value
        return [_small(name, v, layers) if type(v) is int and re.search("token_id", name) else v for v in value]
    if type(value) is not int or not isinstance(name, str):
        return value
    if re.search(r"(token_id|token_index|_id|_ids|_index|token_ids)$", name):
        return _token(name, value)
    for pattern, most in MOST:
        if re.fullmatch(pattern, name):
            return min(value, most)
    return value


def _token(name: str, value: int) -> int:
    if name.startswith("bos"):
        return 0
    if name.startswith(("eos", "pad", "decoder_start", "forced", "_pad")):
        return 1
    if re.search(r"image|video|audio|vision|im_|boi|eoi|boa|eoa|frame", name) and "token" in name:
        return SPECIAL + sum(name.encode()) % 40
    return value if value < VOCAB else SPECIAL + value % 40


def _shrink_sections(rope: dict[str, Any], config: dict[str, Any]) -> None:
    """Parts of a head that turn by time, height and width have to make up the smaller head."""
    for value in rope.values():
        if isinstance(value, dict):
            _shrink_sections(value, config)
    sections = rope.get("mrope_section")
    if sections:
        head = config.get("head_dim") or HEAD
        half = int(head * (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1)) // 2
        rest = half // len(sections)
        rope["mrope_section"] = [half - rest * (len(sections) - 1), *[rest] * (len(sections) - 1)]
    for name in ("short_factor", "long_factor"):
        if isinstance(rope.get(name), list):
            rope[name] = rope[name][: HEAD // 2]
