"""Weight update from few calibration tokens: the fewer there are, the less the inputs' correlations count.

An expert of a mixture sees only the tokens that are routed to it. Its Gram matrix is shrunk towards its diagonal (as
Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", do), where each input
stands for itself and no weight can replace another. So the update becomes smaller and smaller, and none at all
without tokens. This equals a damping of ``(1 + DAMPING) / trust - 1``, with the names of
:mod:`neuronrank_core.update.least_squares`.
"""

from neuronrank_core.kernels import Array

#: Tokens per input at which the correlations count half. Chosen on validation text (docs/understand/experts.md).
HALF = 0.3


def trust(tokens: int, inputs: int) -> float:
    """How much the correlations of inputs count: 0 without tokens, 1 in the limit of many.

    Parameters
    ----------
    tokens : int, >= 0
        Number of tokens in the Gram matrix.
    inputs : int, >= 1
        Number of inputs.

    Returns
    -------
    float in [0, 1]
        ``tokens^2 / (tokens^2 + (HALF * inputs)^2)``
    """
    return tokens**2 / (tokens**2 + (HALF * inputs) ** 2)


def shrunk_gram(gram: Array, tokens: int) -> Array:
    """The Gram matrix of few tokens with all entries beside the diagonal times :func:`trust`.

    Parameters
    ----------
    gram : array, shape (in_features, in_features)
        ``X' X``.
    tokens : int
    """
    shrunk = gram * trust(tokens, len(gram))
    every = range(len(gram))
    shrunk[every, every] = gram.diagonal()
    return shrunk


def shrunk_target(target: Array, weight: Array, gram: Array, tokens: int) -> Array:
    """The products of outputs and inputs for a fit with :func:`shrunk_gram`.

    Parameters
    ----------
    target : array, shape (out_features, in_features)
        ``Y' X``.
    weight : array, same shape
        Dense weight, which the fit keeps in the limit of no tokens.
    gram : array, shape (in_features, in_features)
        ``X' X``, not shrunk.
    tokens : int
    """
    share = trust(tokens, len(gram))
    return target * share + weight * gram.diagonal() * (1 - share)
