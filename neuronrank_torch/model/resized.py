"""What a model's class builds from a configuration with other sizes."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from neuronrank_core.errors import InputError, first_line
from neuronrank_torch.model.quiet import quiet_transformers


def resized_tensors(model: Any, config: Any, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """New shapes of the parameters and buffers that depend, in a model of this class, on sizes in its configuration.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    config : transformers.PreTrainedConfig
        The part of the model's configuration that has the sizes; changed only for the duration of the call.
    sizes : dict of int
        New sizes by name.

    Raises
    ------
    InputError
        If the class refuses them; the message is the class's own.
    """
    before = {name: getattr(config, name) for name in sizes if hasattr(config, name)}
    try:
        for name, size in sizes.items():
            setattr(config, name, size)
        whole = copy.deepcopy(model.config)
        if "num_attention_heads" in sizes:  # Some classes check it only when they read a configuration.
            whole = type(whole).from_dict(whole.to_dict())
        whole.dtype = model.dtype  # Once a model has been saved, its configuration holds a string.
        with torch.device("meta"), quiet_transformers():  # There, transformers initialises nothing.
            other = type(model)(whole)
    except Exception as error:  # What a class raises on a configuration has no common base class.
        raise InputError(first_line(error.__cause__ or error)) from error  # A validator hides the reason.
    finally:
        for name in sizes:
            if name in before:
                setattr(config, name, before[name])
            else:
                delattr(config, name)
    now, then = _shapes(model), _shapes(other)
    return {name: then.get(name, ()) for name, shape in now.items() if shape != then.get(name)}


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}
