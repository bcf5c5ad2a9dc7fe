"""The device to work on."""

from __future__ import annotations

import torch

from neuronrank_core.errors import InputError, first_line


def check_device(device: str | torch.device) -> torch.device:
    """The device by its name; raises InputError if there is none such here."""
    try:
        target = torch.device(device)
        torch.empty(1, device=target).cpu()  # "meta" is a device too, but has nothing to give back.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device} is not available: {first_line(error)}", hint="try --device cpu") from error
    return target


def choose_device(device: str) -> str:
    """Resolve ``auto``."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
