"""What a model passes to its layers besides hidden states: whether it depends on the text."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def unusable(value: Any) -> Any:
    """The value; a tensor of numbers as one of the same shape that holds NaN, so that its use shows."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.new_full((), math.nan).expand(value.shape)
    return value


def has(value: Any, kind: Callable[[Tensor], Tensor]) -> bool:
    """Whether an argument of a layer contains numbers of a kind, such as NaN; looks into containers."""
    return any(bool(kind(tensor).any()) for tensor in numbers(value))


def numbers(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in an argument of a layer; looks into containers."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    for item in items:
        yield from numbers(item)


def same(a: Any, b: Any) -> bool:
    """Whether two arguments of a layer are equal; compares tensors and plain values, also in containers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and (not isinstance(a, (bool, int, float, str)) or a == b)
