"""Parts of ``gpu_check.py``: kernels against NumPy, TF32, the time of single operations, the phases of a run."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuronrank_core.statistics.numpy_kernels import NumpyKernels
from neuronrank_core.statistics.topics import topic_margins
from neuronrank_torch import kernels
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.calibration.layerwise import LayerRun
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.streaming import StreamedModel
from neuronrank_torch.model.tensor_files import shards
from neuronrank_torch.model.weights import SafetensorsWeights
from neuronrank_torch.pruning.sparsity_types.weights import Weights
from neuronrank_torch.runs.verify import contract

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
#: Hidden and intermediate size of a layer of LLaMA 7B; small in a rehearsal.
WIDE = (4096, 11008) if CUDA else (256, 688)
Result = dict[str, Any]


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def peak() -> float:
    """Peak memory in GiB: of the device since the last reset, on a CPU of the process since its start."""
    bytes_ = torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return round(bytes_ / 2**30, 3)


@contextmanager
def phases() -> Iterator[dict[str, dict[str, float]]]:
    """Seconds and peak memory of each phase of the prunes inside, by name; of nested ones, only the outermost."""
    methods = [(LayerRun, "feed"), (LayerCollector, "statistics"), (Weights, "remove"), (Weights, "refit")]
    methods += [(StreamedModel, "_bring")]
    names = ("passes", "tables", "score, select and update", "update after a pass", "read")
    found: dict[str, dict[str, float]] = {}
    inside = False

    def timed(original: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return original(*args, **kwargs)
        synchronize()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        inside, started = True, time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            synchronize()
            inside, of = False, found.setdefault(name, {"seconds": 0.0, "GiB": 0.0})
            of["seconds"] = round(of["seconds"] + time.perf_counter() - started, 3)
            of["GiB"] = max(of["GiB"], peak())

    originals = [getattr(owner, method) for owner, method in methods]

    def method(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: timed(original, name, *args, **kwargs)

    for (owner, attribute), original, name in zip(methods, originals, names, strict=True):
        setattr(owner, attribute, method(original, name))
    try:
        yield found
    finally:
        for (owner, attribute), original in zip(methods, originals, strict=True):
            setattr(owner, attribute, original)


def kernel_checks(dtype: str) -> list[contract.Check]:
    """Each kernel on the device against NumPy in float64, on the same numbers."""
    rng, core, ours, k = np.random.default_rng(0), NumpyKernels(), TorchKernels(DEVICE), 8
    exact = torch.tensor(rng.normal(size=(3, 130, 257))).to(getattr(torch, dtype))
    x, a = exact.to(DEVICE), exact.double().numpy()
    found = [kernels.mean_square(x), *kernels.signal_moments(x)]
    expected = [(a**2).mean(1), abs(a).mean(1), (a**2).mean(1), abs(a).max(1)]
    names = ("mean_square", "signal mean", "signal mean square", "signal peak")
    checks = [contract.real(n, f.cpu(), e) for n, f, e in zip(names, found, expected, strict=True)]
    checks.append(contract.counts("open_gates", kernels.open_gates(x, 0.3).cpu(), (a > np.float32(0.3)).sum(1)))
    sample = abs(exact[0].float().numpy())
    tau, labels = core.quantile_threshold(sample, 0.6), np.arange(len(sample)) % k
    checks.append(contract.counts("quantile_threshold", ours.quantile_threshold(sample, 0.6), tau))
    active = [each.active_tokens(sample, tau, labels, k) for each in (ours, core)]
    checks.append(contract.counts("active_tokens", *active))
    checks.append(contract.real("group_means", *(each.group_means(sample, labels, k) for each in (ours, core))))
    seed = contract.clear_seed(sample, k, 0)
    topics = [each.topics(sample, k, seed or 0) for each in (ours, core)]
    margins = topic_margins(sample, k, seed or 0)[1]
    checks.append(contract.topic_labels("topics", *topics, margins, clear=seed is not None))
    for n, size in ((1, 4), (100, 257), (20_000, 3 * 130 * 257)):
        rows = exact.float().reshape(-1)[: exact.numel() // size * size].reshape(-1, size)
        mask = ours.lowest_k(rows.to(DEVICE), n).cpu().numpy()
        checks.append(contract.counts(f"lowest_k {n} of {size}", mask, core.lowest_k(rows.numpy(), n)))
    gram = (a.reshape(-1, 257).T @ a.reshape(-1, 257)) / a[..., 0].size + 0.3 * np.eye(257)
    inverse = kernels.inverse(torch.tensor(gram).float().to(DEVICE)).cpu().double().numpy()
    error = abs(inverse @ gram.astype(np.float32) - np.eye(257)).max()
    checks.append(contract.Check("inverse", float(error), 1e-5, inverse.size))
    return checks


def check_kernels(dtype: str) -> Result:
    """Every kernel in one precision; fails if one breaks the contract."""
    checks = kernel_checks(dtype)
    wrong = [check.name for check in checks if not check.holds]
    return {"checks": len(checks), "wrong": wrong, "worst": max(c.worst for c in checks if c.limit), "ok": not wrong}


def check_tf32() -> Result:
    """What TF32 changes. It is off in torch unless a program turns it on; NeuronRank does not."""
    before, result = torch.get_float32_matmul_precision(), {}
    x = torch.randn(4096 if CUDA else 512, 512, generator=torch.Generator().manual_seed(0))
    exact = (x.double().T @ x.double()).numpy()
    for precision, name in (("highest", "off"), ("high", "on")):
        torch.set_float32_matmul_precision(precision)
        try:
            gram = (x.to(DEVICE).T @ x.to(DEVICE)).cpu().double().numpy()
            wrong = [check.name for check in kernel_checks("float32") if not check.holds]
        finally:
            torch.set_float32_matmul_precision(before)
        result[name] = {"error of a Gram matrix": float(abs(gram - exact).max() / exact.diagonal().min())}
        result[name]["contract broken by"] = ", ".join(wrong) or "none"
    return {**result, "ok": before == "highest" and result["off"]["contract broken by"] == "none"}


def check_operations() -> Result:
    """Seconds of the operations that a prune of a 7B layer spends its time on, the second time that each is done."""
    hidden, inner = WIDE
    x, weight = torch.randn(2 * inner, inner, device=DEVICE), torch.randn(inner, hidden, device=DEVICE)
    gram = x.T @ x / len(x) + 0.3 * torch.eye(inner, device=DEVICE)
    plain, ours = torch.randn(inner, hidden), TorchKernels(DEVICE)
    work: dict[str, Callable[[], Any]] = {
        "Gram matrix": lambda: x.T @ x,
        "inverse, float64": lambda: kernels.cholesky_inverse(gram.double()),
        "inverse, float32": lambda: kernels.cholesky_inverse(gram),
        "select within rows": lambda: ours.lowest_k(weight, hidden // 2),
        "select within the module": lambda: ours.lowest_k(weight.reshape(1, -1), weight.numel() // 2),
        "select 2:4": lambda: ours.lowest_k(weight.reshape(-1, 4), 2),
        "copy to the device": lambda: plain.to(DEVICE, copy=True),
    }
    if CUDA:
        pinned = plain.pin_memory()
        work["copy from pinned memory"] = lambda: pinned.to(DEVICE, non_blocking=True)
    result = {}
    for name, each in work.items():
        for _ in range(2):
            synchronize()
            started = time.perf_counter()
            each()
            synchronize()
            result[name] = round(time.perf_counter() - started, 5)
    exact, fast = (kernels.cholesky_inverse(m).double() for m in (gram.double(), gram))
    error = float((exact - fast).abs().max() / exact.abs().max())
    slow = kernels._slow_double(torch.device(DEVICE, 0) if CUDA else torch.device("cpu"))
    return {**result, "error of float32": error, "float64 counts as slow": slow, "ok": error < 1e-4}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model."""
    source = SafetensorsWeights(shards(folder))
    return {name: source.tensor(name) for name in source.shapes()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> Result:
    """Mask bits of the MLPs' matrices, and tensors, that differ."""
    mlp = [name for name in a if ".mlp." in name and a[name].ndim == 2]
    bits = sum(int(((a[name] == 0) != (b[name] == 0)).sum()) for name in mlp)
    tensors_ = sum(not torch.equal(a[name], b[name]) for name in a)
    return {"mask bits": sum(a[n].numel() for n in mlp), "bits that differ": bits, "tensors that differ": tensors_}
