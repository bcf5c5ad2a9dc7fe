"""Select exactly k weights of every comparison group; ties go to the lowest index.

Weights that are zero already are among the first. A group with more than k of them has more than k zeros afterwards.
"""

import math
from collections.abc import Callable
from typing import Any

from neuronrank_core.errors import AllZeroMetricError, InvalidValueError, NonFiniteError
from neuronrank_core.kernels import lowest_k


def select(
    score: Any,
    weight: Any,
    *,
    ratio: float,
    compare: str,
    pattern: tuple[int, int] | None = None,
    lowest_k: Callable[[Any, int], Any] = lowest_k,
    where: str = "module",
) -> Any:
    """Choose the weights to zero.

    Parameters
    ----------
    score : array, shape (out_features, in_features)
        NumPy or torch, floating point; may be overwritten.
    weight : array, same shape
        Weights that are already zero count toward the target and are selected first.
    ratio : float in [0, 1]
        ``int(ratio * size)`` weights of each comparison group are selected. Not used with ``pattern``.
    compare : {"module", "row", "column"}
        Comparison group: the whole matrix, each output row, or each input column.
    pattern : (N, M), optional
        The N lowest of every M consecutive inputs of a row are selected.
    lowest_k : callable
        The backend's kernel.
    where : str
        Used in error messages.

    Returns
    -------
    bool array, same shape; True = is set to zero

    Raises
    ------
    AllZeroMetricError
        If every score is zero.
    NonFiniteError
        If a score is NaN or Inf.
    InvalidValueError
        If M does not divide the number of inputs, or the ratio or the comparison group is not one of those above.
    """
    shape = tuple(score.shape)
    size, k = comparison_group(shape, ratio=ratio, compare=compare, pattern=pattern, where=where)
    if 0 in shape:
        return score != score
    if not (math.isfinite(float(score.min())) and math.isfinite(float(score.max()))):
        raise NonFiniteError(f"NaN or Inf in the scores of {where}", hint="check the weights, or lower the exponents")
    if k == 0:
        return score != score
    if not bool((score != 0).any()):
        raise AllZeroMetricError(where)
    score[weight == 0] = -math.inf
    if compare == "column" and pattern is None:
        return lowest_k(score.T.reshape(-1, size), k).T
    return lowest_k(score.reshape(-1, size), k).reshape(shape)


def exact_ratio(count: int, size: int) -> float:
    """A ratio of which ``int(ratio * size)`` is ``count``."""
    ratio = count / size
    return ratio if int(ratio * size) == count else math.nextafter(ratio, 1)


def comparison_group(
    shape: tuple[int, int],
    *,
    ratio: float,
    compare: str,
    pattern: tuple[int, int] | None = None,
    where: str = "module",
) -> tuple[int, int]:
    """Size of a comparison group, and how many of its weights are selected; see :func:`select`."""
    rows, columns = shape
    if pattern is None:
        sizes = {"module": rows * columns, "row": columns, "column": rows}
        if compare not in sizes:
            raise InvalidValueError("compare", compare, "one of " + ", ".join(sizes))
        if not 0 <= ratio <= 1:
            raise InvalidValueError("ratio", ratio, "[0, 1]")
        return sizes[compare], int(ratio * sizes[compare])
    n, m = pattern
    if columns % m:
        raise InvalidValueError("sparsity_type", f"{n}:{m}", f"an M that divides the {columns} inputs of {where}")
    return m, n
