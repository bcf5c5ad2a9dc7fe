"""One fixture that runs every kernel test on every backend, and the files that several rooms are tested on.

This folder must not become a package: as one it would be called ``torch`` and hide the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from fake_gpu import DEVICE, EXISTS, fake_gpu
from tiny_files import small, write_folder, write_gguf

from neuronrank_core.kernels import Kernels
from neuronrank_core.statistics.numpy_kernels import NumpyKernels
from neuronrank_torch.kernels import TorchKernels

# More threads only wait for each other on matrices this small.
torch.set_num_threads(1)

BACKENDS = ["numpy", "cpu", *([DEVICE] if EXISTS else []), *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module", params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Each backend in turn; the reference among them, so that a test cannot ask what it does not do itself."""
    with fake_gpu() if request.param == DEVICE else nullcontext():
        yield NumpyKernels() if request.param == "numpy" else TorchKernels(request.param)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """No progress bars of transformers."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model, as transformers saves it."""
    return write_folder(tmp_path / "source")


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """The same model as a GGUF file."""
    return write_gguf(tmp_path / "tiny.gguf", small())
