"""Arrays in and out of a backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from neuronrank_core import kmeans
from neuronrank_core.kernels import Kernels, NumpyKernels
from neuronrank_torch.kernels import TorchKernels

REFERENCE = NumpyKernels()
#: Relative margin from which two backends have to agree (SPEC: equivalence contract).
MARGIN = 1e-5


def native(kernels: Kernels, array: np.ndarray) -> Any:
    """A copy of the array in the backend's library, on its device; bits and precision are kept."""
    return torch.tensor(array, device=kernels.device) if isinstance(kernels, TorchKernels) else array.copy()


def to_numpy(array: Any) -> np.ndarray:
    """The way back."""
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def signal(seed: int, tokens: int, neurons: int, *, whole: bool) -> np.ndarray:
    """Signal rows, >= 0, float32; whole numbers where ties and silent neurons should be common."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(tokens, neurons)) * rng.lognormal(size=neurons)
    return abs(values.round() if whole else values).astype(np.float32)


def margins(sample: np.ndarray, k: int, seed: int) -> tuple[float, np.ndarray]:
    """How clear the reference's choices were: the least of all updates, and each token's at the end.

    An update on a near-tie may move a centroid, and with it choices that are clear at the end.
    """
    projection, initial = kmeans.topic_draws(*sample.shape, k, seed)
    rows = kmeans.unit_rows(sample.astype(np.float64) @ projection)
    centroids, seen = rows[initial], []
    for _ in range(kmeans.ITERATIONS + 1):
        dots = np.sort(rows @ centroids.T, axis=1)
        seen.append((dots[:, -1] - dots[:, -2]) / abs(dots[:, -1]))
        centroids = kmeans.update(rows, kmeans.assign(rows, centroids), centroids)
    return float(np.min(seen[:-1])), seen[-1]
