"""One fixture that runs every kernel test on every backend.

This folder must not become a package: as one it would be called ``torch`` and hide the real one.
"""

from __future__ import annotations

import pytest
import torch

from neuronrank_core.kernels import Kernels
from neuronrank_core.statistics.numpy_kernels import NumpyKernels
from neuronrank_torch.kernels import TorchKernels

# More threads only wait for each other on matrices this small.
torch.set_num_threads(1)

BACKENDS = ["numpy", "cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="session", params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Each backend in turn; the reference among them, so that a test cannot ask what it does not do itself."""
    return NumpyKernels() if request.param == "numpy" else TorchKernels(request.param)
