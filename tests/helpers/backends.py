"""Arrays in and out of a backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from neuronrank_core.kernels import Kernels
from neuronrank_core.statistics.numpy_kernels import NumpyKernels
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
