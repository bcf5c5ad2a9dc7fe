"""A model with fewer of its layers."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from neuronrank_core.errors import InputError, first_line
from neuronrank_torch.model.families.layout import at_path
from neuronrank_torch.model.quiet import quiet_transformers
from neuronrank_torch.model.structure import LAYERS, Decoder, find_decoder

#: Names under which modules hold the number of their layer.
_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")
#: Names of lists with an entry per layer; others may happen to be as long.
_PER_LAYER = re.compile("layer|block|pattern")
#: Lists in configurations of numbers of layers.
_INDICES = ("mlp_only_layers",)
#: Names of the number of layers for multi-token prediction in configurations.
_PREDICTORS = ("num_mtp_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers")
_HINT = "layers of this model cannot be removed yet: remove neurons, or prune weights instead"


def shallower(config: Any, kept: Sequence[int]) -> dict[str, Any]:
    """The entries of a configuration that change with its layers: their number, and lists with an entry per layer.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    kept : sequence of int
        The layers that stay, ascending.
    """
    depth: int = config.num_hidden_layers
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in vars(config).items():
        if name in _INDICES and value:
            changes[name] = [kept.index(index) for index in value if index in kept]
        elif isinstance(value, (list, tuple)) and len(value) == depth and _PER_LAYER.search(name):
            changes[name] = type(value)(value[index] for index in kept)
    return changes


def forget_predictors(config: Any) -> None:
    """Have a configuration state that there are no layers for multi-token prediction."""
    for part in {id(one): one for one in (config, config.get_text_config())}.values():
        for name in vars(part).keys() & set(_PREDICTORS):
            setattr(part, name, 0)


def keep_layers(decoder: Decoder, kept: Sequence[int]) -> None:
    """Let a model have only these of its original layers, also in its configuration.

    Parameters
    ----------
    decoder : Decoder
        The original one.
    kept : sequence of int
        The layers that stay, ascending.
    """
    owner, name = _owner(decoder)
    vars(decoder.body.config).update(shallower(decoder.body.config, kept))
    setattr(owner, name, nn.ModuleList(decoder.layers[index].module for index in kept))
    for number, index in enumerate(kept):  # Caches use the numbers.
        for module in decoder.layers[index].module.modules():
            for attribute in _NUMBERS:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, number)


@contextmanager
def with_layers(decoder: Decoder, kept: Sequence[int]) -> Iterator[None]:
    """Context in which a model has only these of its original layers, with their numbers; it has no cache.

    Parameters
    ----------
    decoder, kept
        As in :func:`keep_layers`.
    """
    owner, name = _owner(decoder)
    config: Any = decoder.body.config
    whole, changes = getattr(owner, name), shallower(config, kept)
    before = {name: getattr(config, name) for name in changes}
    vars(config).update(changes)
    setattr(owner, name, nn.ModuleList(decoder.layers[index].module for index in kept))
    try:
        yield
    finally:
        vars(config).update(before)
        setattr(owner, name, whole)


def _owner(decoder: Decoder) -> tuple[Any, str]:
    """The module that has the list of layers, and its name there."""
    path = next(path for path in LAYERS if isinstance(at_path(decoder.body, path), nn.ModuleList))
    parent, _, name = path.rpartition(".")
    return (at_path(decoder.body, parent) if parent else decoder.body), name


def check_depth(model: Any, decoder: Decoder, kept: Sequence[int]) -> None:
    """Refuse layers to keep if the model's class, configured to them, would build others; raises InputError."""
    config: Any = getattr(decoder.body, "config", None)
    if "num_hidden_layers" not in vars(config or decoder) or config.num_hidden_layers != len(decoder.layers):
        raise InputError(f"the configuration of {type(model).__name__} does not state its layers", hint=_HINT)
    with with_layers(decoder, kept):
        whole = copy.deepcopy(model.config)
    whole.dtype = model.dtype
    try:
        with torch.device("meta"), quiet_transformers():  # There, transformers initialises nothing.
            other = find_decoder(type(model)(type(whole).from_dict(whole.to_dict())))
    except Exception as error:  # What a class raises on a configuration has no common base class.
        reason = first_line(error.__cause__ or error)
        raise InputError(f"{type(model).__name__} cannot have {len(kept)} layers: {reason}", hint=_HINT) from error
    built = [_described(layer.module) for layer in other.layers]
    if built != [_described(decoder.layers[index].module) for index in kept]:
        raise InputError(
            f"with {len(kept)} layers, {type(model).__name__} would build layers of another kind",
            hint=_HINT,
        )


@torch.no_grad()
def check_all_run(model: Any, decoder: Decoder, tokens: torch.Tensor) -> None:
    """Refuse a model that skips layers where it gets tokens alone, without a picture; raises InputError."""
    ran: list[nn.Module] = []
    hooks = [layer.module.register_forward_pre_hook(lambda layer, _: ran.append(layer)) for layer in decoder.layers]
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if skipped := [str(layer.index) for layer in decoder.layers if layer.module not in ran]:
        raise InputError(f"{type(model).__name__} does not run layers {', '.join(skipped)} on text alone", hint=_HINT)


def check_cache(model: Any, decoder: Decoder, kept: Sequence[int]) -> None:
    """Refuse layers to keep if none of them is of attention, in a hybrid model; raises InputError.

    The cache of transformers counts tokens by a layer of attention, so the model could not generate text.
    """
    before = _counts_tokens(model.config)
    with with_layers(decoder, kept):
        after = _counts_tokens(model.config)
    if before and not after:
        raise InputError(
            f"{type(model).__name__} cannot generate text without layers of attention", hint="remove fewer layers"
        )


def _counts_tokens(config: Any) -> bool:
    """Whether the cache of transformers can tell how many tokens it has seen."""
    try:
        DynamicCache(config=config.get_text_config(decoder=True)).get_seq_length()
    except (AttributeError, KeyError, ValueError):  # No layer of attention, or a model with a cache of its own.
        return False
    return True


def _described(layer: nn.Module) -> dict[str, Any]:
    """Shapes and settings of a layer, such as the kind of its attention; not its number."""
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    settings = {
        f"{path}:{name}": value
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None)))
        and not name.startswith("_")
        and name not in ("training", *_NUMBERS)
    }
    return shapes | settings
