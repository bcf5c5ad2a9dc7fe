"""Tiny models on disk: a folder as transformers writes it, and a GGUF file as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import BOS, EOS, VOCAB, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def small(family: Any = "llama", **options: Any) -> PreTrainedModel:
    """The smallest of the tiny models."""
    return tiny_model(family, layers=2, hidden=32, intermediate=64, **options)


def logits(model: PreTrainedModel) -> torch.Tensor:
    """What a model makes of one fixed sequence: equal for equal models."""
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def write_model(path: Path | str, model: PreTrainedModel, *, bos: bool = True, **save_options: Any) -> Path:
    """Save a model by transformers alone, with the byte-level tokenizer of the tests."""
    model.save_pretrained(path, **save_options)
    tiny_tokenizer(bos).save_pretrained(path)
    return Path(path)


def greedy(folder: Path, text: str, count: int, *, special: bool = True) -> str:
    """What a saved model appends to a text if each token is the most likely one, until it ends its text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text, add_special_tokens=special)["input_ids"]
    start = len(tokens)
    with torch.no_grad():
        while len(tokens) < start + count and tokens[-1] != EOS:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return str(tokenizer.decode(tokens[start:], skip_special_tokens=True))


def write_folder(path: Path, **save_options: Any) -> Path:
    """Save :func:`small`."""
    return write_model(path, small(), **save_options)


def write_gguf(path: Path, model: PreTrainedModel, *, licence: str = "") -> Path:
    """Write a tiny llama as llama.cpp's converter does, with the byte-level tokenizer of the tests."""
    import gguf  # A machine with a GPU may lack it.

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    if licence:
        writer.add_license(licence)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    # A merge is part of the format; its result takes the place of a byte that no UTF-8 text holds.
    tokens = ["ab" if token == "À" else token for token in tiny_tokenizer().convert_ids_to_tokens(range(VOCAB))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (VOCAB - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        for layer, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if layer in name:  # The rotary halves are interleaved there.
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
