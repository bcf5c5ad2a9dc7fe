"""What a model passes to its layers besides hidden states: whether it depends on the text."""

import math
from typing import Any

import torch
from torch import Tensor


def unusable(value: Any) -> Any:
    """The value; a tensor of numbers as one of the same shape that holds NaN, so that its use shows."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.new_full((), math.nan).expand(value.shape)
    return value


def has_nan(value: Any) -> bool:
    """Whether an argument of a layer contains NaN; looks into containers."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and bool(value.isnan().any())
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return False
    return any(map(has_nan, value))


def same(a: Any, b: Any) -> bool:
    """Whether two arguments of a layer are equal; compares tensors and plain values, also in containers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and (not isinstance(a, (bool, int, float, str)) or a == b)
