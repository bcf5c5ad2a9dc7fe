"""Tiny quantised checkpoints in the published layouts, with what each tensor stands for, decoded in NumPy.

The stored bytes are random and the scales few-bit multiples of powers of two, so every weight is exact in bfloat16.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny import BOS, EOS, VOCAB, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, PreTrainedConfig, PreTrainedModel

Array = np.ndarray[Any, Any]
#: Values of a 4-bit number, by its bits.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
COMMON: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS}


def llama(hidden: int = 40, intermediate: int = 56, family: Any = "llama") -> PreTrainedConfig:
    return tiny_config(family, layers=2, hidden=hidden, intermediate=intermediate, tied=False)


def deepseek(**options: Any) -> PreTrainedConfig:
    """A dense layer, then one with experts; shapes that no block of the tests divides."""
    return DeepseekV3Config(
        **COMMON
        | {"hidden_size": 40, "intermediate_size": 56, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 20}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8, "max_position_embeddings": 256},
        **options,
    )


def gpt_oss(hidden: int = 64, intermediate: int = 96) -> PreTrainedConfig:
    return GptOssConfig(
        **COMMON, hidden_size=hidden, intermediate_size=intermediate, num_local_experts=3, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=16, max_position_embeddings=256,
    )  # fmt: skip


def e4m3(bits: Array) -> Array:
    """Values of 8-bit numbers with 4 bits of exponent and 3 of mantissa, by the definition of the format."""
    sign, exponent, mantissa = bits >> 7, (bits >> 3).astype(np.int32) & 15, bits & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(sign, -1, 1) * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal).astype(np.float32)


def write_fp8(path: Path, config: PreTrainedConfig, block: tuple[int, int] | None, seed: int = 0) -> dict[str, Array]:
    """Write a model whose projections are in FP8; the values of those by their names in the checkpoint."""
    rng = np.random.default_rng(seed)
    tensors = _saved(path, config)
    dense: dict[str, Array] = {}
    for name in [name for name in tensors if re.search(r"_proj(_with_mqa)?\.weight|_[ab]_proj\.weight", name)]:
        rows, columns = tensors[name].shape
        bits = rng.integers(0, 127, (rows, columns), np.uint8) + 128 * rng.integers(0, 2, (rows, columns), np.uint8)
        grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1])) if block else ()
        # 80 is about the root mean square of random bytes.
        scales = rng.integers(1, 16, grid).astype(np.float32) * 2.0 ** -math.ceil(math.log2(8 * 80 * columns**0.5))
        spread = np.asarray(scales, np.float32)
        if block:
            at_row, at_column = (np.arange(n) // step for n, step in zip((rows, columns), block, strict=True))
            spread = spread[at_row][:, at_column]
        dense[name] = e4m3(bits) * spread
        tensors[name] = torch.from_numpy(bits).view(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.from_numpy(np.asarray(scales, np.float32))
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    _write(path, tensors, settings)
    return dense


def write_mxfp4(path: Path, config: PreTrainedConfig, seed: int = 0) -> dict[str, Array]:
    """Write a GPT-OSS whose experts are in MXFP4; their values, transposed as the model has them, by name."""
    rng = np.random.default_rng(seed)
    tensors = _saved(path, config)
    dense: dict[str, Array] = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        scales = rng.integers(119, 125, blocks.shape[:-1], np.uint8)
        values = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], axis=-1)  # The low half of a byte comes first.
        values = values.reshape(*scales.shape, 32) * 2.0 ** (scales[..., None].astype(np.float32) - 127)
        dense[name] = values.reshape(experts, rows, columns).swapaxes(1, 2)
        tensors |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _write(path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return dense


def as_bfloat16(value: Array) -> torch.Tensor:
    """A tensor of exactly these values."""
    tensor = torch.from_numpy(np.ascontiguousarray(value, np.float32))
    assert torch.equal(tensor.bfloat16().float(), tensor), "the fixture is not exact in bfloat16"
    return tensor.bfloat16()


def edit(path: Path, change: Any) -> None:
    """Have ``change`` modify the tensors of a folder, by name."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def set_config(path: Path, **changes: Any) -> None:
    """Change fields of ``config.json``; None removes one."""
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def _saved(path: Path, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Tensors of a random model as transformers saves them: gains and biases far from where they start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in [*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)]:
                parameter += torch.randn_like(parameter) * 0.3
    model.save_pretrained(path)
    tiny_tokenizer(True).save_pretrained(path)
    return load_file(path / "model.safetensors")


def _write(path: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    set_config(path, quantization_config=settings)
