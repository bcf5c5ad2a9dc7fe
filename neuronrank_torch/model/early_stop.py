"""Ends a forward pass as soon as it has computed what is needed."""

from collections.abc import Callable
from contextlib import suppress

from torch import Tensor
from torch.utils.hooks import RemovableHandle


class StopForward(Exception):  # noqa: N818 (no error)
    """Raised in a hook to end the forward pass; the caller of the forward suppresses it."""


def captured(register: Callable[[Callable[[Tensor], None]], RemovableHandle], forward: Callable[[], object]) -> Tensor:
    """The tensor that a hook sees first, in a forward pass that ends there.

    Parameters
    ----------
    register : callable
        Registers a hook that calls the given function with a tensor; returns its handle.
    forward : callable
        The forward pass.
    """
    seen: list[Tensor] = []

    def stop(tensor: Tensor) -> None:
        seen.append(tensor)
        raise StopForward

    with register(stop), suppress(StopForward):
        forward()
    return seen[0]
