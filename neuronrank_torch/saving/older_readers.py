"""What transformers 4, and runtimes that follow it, look for in a saved model and transformers 5 does not write.

transformers 5 keeps all parameters of rotary position embeddings (RoPE) in ``rope_parameters``. Older readers look for
``rope_theta`` and others beside it, and use defaults without a message if they are missing. They refuse tokenizers with
names that only transformers 5 knows.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from neuronrank_torch.files.json import read_json, write_json

#: Families whose older keys have other names.
RENAMED = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
}
#: Families that allow these entries of ``rope_scaling`` alone.
SCALED_BY = {"phi3": ("type", "short_factor", "long_factor")}


def add_older_keys(config: PreTrainedConfig, file: Path) -> None:
    """Add the older keys to a saved configuration, unless transformers 5 then reads other parameters or refuses it.

    Parameters
    ----------
    config : PreTrainedConfig
        The configuration that was saved.
    file : pathlib.Path
        Its ``config.json``.
    """
    saved, content = file.read_text("utf-8"), read_json(file)
    for part in _parts(content):
        family, older = part.get("model_type", ""), older_keys(part["rope_parameters"])
        if family in SCALED_BY and "rope_scaling" in older:
            scaling = {**older["rope_scaling"], "type": part["rope_parameters"].get("rope_type", "default")}
            older["rope_scaling"] = {name: scaling[name] for name in SCALED_BY[family] if name in scaling}
        for key, value in older.items():
            part.setdefault(RENAMED.get(family, {}).get(key, key), value)
    write_json(file, content)
    if not _read_alike(config, file.parent):
        file.write_text(saved, "utf-8")


def rename_tokenizer(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Use those names in a saved tokenizer that both versions know.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The tokenizer that was saved.
    file : pathlib.Path
        Its ``tokenizer_config.json``.
    """
    content = read_json(file)
    if content.get("tokenizer_class") == "TokenizersBackend":
        # Of other inputs, the older class would make token types by default, which most decoders refuse.
        content |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    write_json(file, content)


def older_keys(rope: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 has in place of ``rope_parameters``; empty if it has nothing for them.

    Parameters
    ----------
    rope : dict
        Parameters for all layers, or, as in Gemma 3, for full and sliding attention.
    """
    if rope.keys() == {"full_attention", "sliding_attention"} and all(rope.values()):
        local = rope["sliding_attention"]["rope_theta"]
        return {**older_keys(rope["full_attention"]), "rope_local_base_freq": local}
    if "rope_theta" not in rope:
        return {}
    keys: dict[str, Any] = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in keys}
    return keys if scaling in ({}, {"rope_type": "default"}) else {**keys, "rope_scaling": scaling}


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration and those inside it, as far as they have rotary position embeddings."""
    if isinstance(config.get("rope_parameters"), dict):
        yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _rope_parameters(config: PreTrainedConfig) -> list[Any]:
    """The parameters without ``type``, an older name of ``rope_type`` that transformers 5 keeps beside it."""
    parts = (part["rope_parameters"] for part in _parts(config.to_dict()))
    return [{name: value for name, value in part.items() if name != "type"} for part in parts]


def _read_alike(config: PreTrainedConfig, folder: Path) -> bool:
    """Whether transformers 5 reads the parameters of ``config`` from a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _rope_parameters(type(config).from_pretrained(folder)) == _rope_parameters(config)
        except Exception:  # Each kind of configuration has checks of its own.
            return False
