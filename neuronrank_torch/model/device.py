"""The device on which a model runs."""

import torch

from neuronrank_core.errors import InputError, first_line


def check_device(device: str | torch.device) -> torch.device:
    """The device of a name, with ``auto`` resolved; raises InputError if it is not available."""
    try:
        target = torch.device(choose_device(device) if isinstance(device, str) else device)
        torch.empty(1, device=target).cpu()  # A "meta" tensor has no data to copy.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device} is not available: {first_line(error)}", hint="try --device cpu") from error
    return target


def choose_device(device: str) -> str:
    """The name of a device, with ``auto`` resolved: a GPU if there is one, otherwise the CPU."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
