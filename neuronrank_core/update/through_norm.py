"""Carries a change of a layer's output back to the output of its MLP, through a norm or a factor in between.

What a small error of the MLP's output changes in the layer's output is approximated by a gain of each token times one
of each feature: a norm divides a token by its size and multiplies the features, a factor multiplies all.
"""

import numpy as np
from numpy.typing import NDArray

from neuronrank_core.kernels import Array

#: Square of a feature's gain, relative to the median over features, below which it is carried back less.
FLOOR = 0.1


def token_gain(change: NDArray[np.float32], error: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much larger an error of the MLP's output is in the layer's output, at each token.

    Parameters
    ----------
    change, error
        See :func:`neuronrank_core.selection.allocation.error_gain`, which is the square of this for a whole text.

    Returns
    -------
    array, shape (tokens,)
        0 where there is no error.
    """
    return _ratio(np.linalg.norm(change, axis=1), np.linalg.norm(error, axis=1))


def feature_sums(change: NDArray[np.float32], error: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums over tokens from which :func:`feature_gain` follows; those of several texts are added.

    Parameters
    ----------
    change, error
        See :func:`neuronrank_core.selection.allocation.error_gain`.

    Returns
    -------
    array, shape (2, hidden_size)
        Of the products of change and error, and of the squares of the error, both with norm 1 at each token.
    """
    change, error = (_ratio(array, np.linalg.norm(array, axis=1, keepdims=True)) for array in (change, error))
    return np.stack([(change * error).sum(axis=0), np.square(error).sum(axis=0)])


def feature_gain(sums: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much larger an error of each feature is in the layer's output, relative to the gains of the tokens.

    Parameters
    ----------
    sums : array, shape (2, hidden_size)
        See :func:`feature_sums`.

    Returns
    -------
    array, shape (hidden_size,)
        The least-squares fit.
    """
    return _ratio(sums[0], sums[1])


def explained(sums: NDArray[np.float32]) -> float:
    """Share of the changes, in squares, that the gains of tokens and features explain; 1 without any error.

    Parameters
    ----------
    sums : array, shape (2, hidden_size)
        See :func:`feature_sums`.
    """
    total = float(sums[1].sum())
    return float((feature_gain(sums) * sums[0]).sum()) / total if total else 1.0


def feature_inverse(gain: NDArray[np.float32]) -> NDArray[np.float32]:
    """The factor of each feature by which a change is carried back.

    Features with a small gain would need changes that no weights can make and that a norm spreads to all features. So
    they are changed as if the square of their gain were :data:`FLOOR` times the median, not the mean: in Gemma 3 one
    feature can have 100 times the gain of most others.

    Parameters
    ----------
    gain : array, shape (hidden_size,)
        See :func:`feature_gain`.

    Returns
    -------
    array, shape (hidden_size,)
        ``1 / gain``; less where the gain is small.
    """
    square = np.square(gain)
    return _ratio(gain, np.maximum(square, FLOOR * np.median(square)))


def carried_back(lost: Array, token: Array, inverse: Array) -> Array:
    """The change of the MLP's output that changes the layer's output by ``lost``.

    Parameters
    ----------
    lost : array, shape (..., hidden_size)
    token : array, shape (...)
        See :func:`token_gain`. Where it is 0 there is no change.
    inverse : array, shape (hidden_size,)
        See :func:`feature_inverse`.

    Returns
    -------
    array, shape (..., hidden_size)
    """
    return lost * ((token != 0) / (token + (token == 0)))[..., None] * inverse


def _ratio(above: NDArray[np.float32], below: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.divide(
        above, below, out=np.zeros(above.shape, np.result_type(above, below, np.float32)), where=below != 0
    )
