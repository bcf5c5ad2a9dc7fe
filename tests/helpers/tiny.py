"""Tiny random models and a byte-level tokenizer: everything a test needs, made offline in milliseconds."""

from __future__ import annotations

from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

Family = Literal["llama", "mistral", "qwen3", "gemma3", "granite", "bitnet"]
#: Families whose MLPs are mixtures of experts.
MoeFamily = Literal["mixtral", "qwen3_moe"]

#: Specials first, then one token for each of the 256 bytes.
BOS, EOS = 0, 1
#: Size of the vocabulary of :func:`tiny_tokenizer`, and the least a model fed by it needs.
VOCAB = 258


def tiny_config(
    family: Family | MoeFamily = "llama",
    *,
    layers: int = 4,
    hidden: int = 64,
    intermediate: int = 128,
    vocab: int = VOCAB,
    tied: bool = True,
) -> PreTrainedConfig:
    """The configuration :func:`tiny_model` builds from."""
    common = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": None,
        "tie_word_embeddings": tied,
    }
    if family == "llama":
        return LlamaConfig(**common)
    if family == "mistral":
        # A window shorter than a test's sequence, so that sliding attention is exercised.
        return MistralConfig(**common, sliding_window=16)
    if family == "qwen3":
        return Qwen3Config(**common)
    if family == "gemma3":
        # Alternating kinds: each layer kind has its own rotary embedding and attention mask.
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        return Gemma3TextConfig(
            **common,
            layer_types=kinds,
            sliding_window=16,
            query_pre_attn_scalar=hidden // 4,
            hidden_activation="gelu_pytorch_tanh",
        )
    if family == "granite":
        # Biases everywhere, and multipliers of embeddings, attention, residuals and logits.
        multipliers = {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7}
        return GraniteConfig(**common, **multipliers, logits_scaling=2.0, attention_bias=True, mlp_bias=True)
    if family == "bitnet":
        return BitNetConfig(**common, hidden_act="relu2")  # With norms between the matrices of MLP and attention.
    if family == "mixtral":
        return MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)
    if family == "qwen3_moe":
        # The second layer is dense, as `mlp_only_layers` of some of that family are.
        experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": intermediate // 2}
        return Qwen3MoeConfig(**common, **experts, norm_topk_prob=True, mlp_only_layers=[1])
    raise ValueError(f"unknown family {family!r}")


def tiny_model(
    family: Family | MoeFamily = "llama",
    *,
    layers: int = 4,
    hidden: int = 64,
    intermediate: int = 128,
    vocab: int = VOCAB,
    seed: int = 0,
    tied: bool = True,
) -> PreTrainedModel:
    """A random causal language model: float32, CPU, eval mode, the same for the same arguments.

    Matrices are scaled to keep activations of order one through every layer, and norms are not all ones, so that a
    skipped norm, a swapped gate/up pair or a forgotten residual changes the logits visibly. The global random state
    is left as it was.
    """
    config = tiny_config(family, layers=layers, hidden=hidden, intermediate=intermediate, vocab=vocab, tied=tied)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                # Gains far from one, biases far from zero.
                parameter.add_((0.5 if family in ("granite", "bitnet") else 0.1) * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    model.tie_weights()
    return model.eval()


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a UTF-8 byte, so any text can be encoded and decoded back.

    Parameters
    ----------
    bos : bool
        Whether it puts ``<s>`` (id :data:`BOS`) before a text by itself, as LLaMA's does. The token exists either way.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )
