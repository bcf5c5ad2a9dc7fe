"""Topics: cosine (spherical) k-means on a random projection.

Dhillon & Modha 2001, "Concept decompositions for large sparse text data using clustering".
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neuronrank_core.errors import InvalidValueError
from neuronrank_core.statistics.tfidf import group_sums

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]
#: Dimension of the random projection.
PROJECTION_DIM = 128
#: Lloyd iterations.
ITERATIONS = 4


def topic_draws(tokens: int, features: int, k: int, seed: int) -> tuple[NDArray[np.float32], Labels]:
    """Draw all random numbers of a clustering, the same for every backend.

    Returns
    -------
    projection : float32 array, shape (features, PROJECTION_DIM)
        Gaussian, scaled by ``1 / sqrt(PROJECTION_DIM)``.
    initial : int64 array, shape (k,)
        Indices of distinct tokens whose rows are the initial centroids.

    Raises
    ------
    InvalidValueError
        If there are fewer tokens than topics.
    """
    if not 1 <= k <= tokens:
        raise InvalidValueError("tfidf_k", k, f"[1, {tokens}], the number of sampled tokens")
    rng = np.random.default_rng(seed)
    projection = rng.standard_normal((features, PROJECTION_DIM), dtype=np.float32) / np.float32(PROJECTION_DIM**0.5)
    return projection, rng.choice(tokens, size=k, replace=False)


def unit_rows(rows: ArrayLike) -> Matrix:
    """Rows scaled to Euclidean length 1; zero rows stay zero, and a row with NaN or Inf has NaN."""
    x = np.asarray(rows, dtype=np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.divide(x, norm, out=np.zeros_like(x), where=norm != 0))


def assign(rows: ArrayLike, centroids: ArrayLike) -> Labels:
    """Centroid with the largest dot product for each row, shape (tokens,); ties go to the lowest index."""
    return np.asarray(np.argmax(np.asarray(rows) @ np.asarray(centroids).T, axis=1))


def update(rows: Matrix, labels: Labels, centroids: Matrix) -> Matrix:
    """Normalised mean of each cluster's rows; an empty cluster keeps its centroid."""
    sums = group_sums(rows, labels, len(centroids))
    moved = np.linalg.norm(sums, axis=1) > 0
    return np.where(moved[:, None], unit_rows(sums), centroids)


def spherical_kmeans(rows: ArrayLike, centroids: ArrayLike, iterations: int = ITERATIONS) -> tuple[Labels, Matrix]:
    """Lloyd's algorithm under cosine similarity.

    Parameters
    ----------
    rows : array, shape (tokens, dim)
        Unit rows.
    centroids : array, shape (k, dim)
        Initial centroids, unit rows.
    iterations : int
        Number of assign-and-update steps; the returned labels are those of the returned centroids.

    Returns
    -------
    labels : int64 array, shape (tokens,)
    centroids : float64 array, shape (k, dim)
    """
    x, c = np.asarray(rows, dtype=np.float64), np.asarray(centroids, dtype=np.float64)
    for _ in range(iterations):
        c = update(x, assign(x, c), c)
    return assign(x, c), c


def topics(sample: ArrayLike, k: int, seed: int) -> Labels:
    """Topic of each sampled token.

    Parameters
    ----------
    sample : array, shape (tokens, neurons)
        Signal rows of the sampled tokens of all documents, clustered together.
    k : int
        Number of topics; some may be empty.
    seed : int

    Returns
    -------
    int64 array, shape (tokens,), in [0, k)
    """
    a = np.asarray(sample)
    projection, initial = topic_draws(a.shape[0], a.shape[1], k, seed)
    rows = unit_rows(a.astype(np.float64) @ projection)
    return spherical_kmeans(rows, rows[initial])[0]


def topic_margins(sample: ArrayLike, k: int, seed: int) -> tuple[float, Matrix]:
    """Margins of the assignments of :func:`topics`: (best - second best) / best similarity, 0 for an all-zero row.

    Backends may differ where an assignment is nearly a tie: in that token's topic and, if an update followed, in
    everything that depends on the updated centroid.

    Parameters
    ----------
    sample, k, seed
        As for :func:`topics`; ``k`` is 2 or more.

    Returns
    -------
    updates : float
        Smallest margin of all assignments that were followed by an update.
    last : float64 array, shape (tokens,)
        Margin of each token's final topic.
    """
    a = np.asarray(sample)
    projection, initial = topic_draws(a.shape[0], a.shape[1], k, seed)
    rows = unit_rows(a.astype(np.float64) @ projection)
    centroids, seen = rows[initial], []
    for _ in range(ITERATIONS + 1):
        second, best = np.sort(rows @ centroids.T, axis=1)[:, -2:].T
        seen.append(np.divide(best - second, abs(best), out=np.zeros_like(best), where=best != 0))
        centroids = update(rows, assign(rows, centroids), centroids)
    return float(np.min(seen[:-1])), seen[-1]
