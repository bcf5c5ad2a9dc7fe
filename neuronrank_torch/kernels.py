"""The core's kernels on torch tensors: same names and results, tested for equality."""

import math
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuronrank_core.kernels import Counts, Vector
from neuronrank_core.statistics import tfidf
from neuronrank_core.statistics import topics as kmeans

#: Maximum number of tokens of a document that are reduced at a time on a CPU.
BLOCK_TOKENS = 64
#: CUDA compute capabilities whose float64 is at least half as fast as float32; elsewhere it takes 32 times as long.
FAST_DOUBLE = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


class TorchKernels:
    """Kernels over sampled tokens and weights on one device; see :class:`neuronrank_core.kernels.Kernels`.

    Inputs and outputs of the token kernels are NumPy arrays; computation is in float32 on ``device``.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._held: tuple[weakref.ref[NDArray[np.float32]], Tensor] | None = None

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.as_tensor(array, device=self.device)

    def _sample(self, sample: NDArray[np.float32]) -> Tensor:
        """The sample on the device: copied once for all kernels, and freed there when the array is."""
        if self._held is None or self._held[0]() is not sample:
            self._held = None  # First, so that two samples are never on the device.
            self._held = weakref.ref(sample, self._forget), self._tensor(sample)
        return self._held[1]

    def _forget(self, sample: weakref.ref[NDArray[np.float32]]) -> None:
        if self._held is not None and self._held[0] is sample:
            self._held = None

    def asarray(self, vector: NDArray[Any], like: Tensor) -> Tensor:
        """Convert a final vector to the device and precision of a weight."""
        return torch.as_tensor(vector, dtype=like.dtype, device=like.device)

    def to_numpy(self, array: Tensor) -> NDArray[Any]:
        """Convert a tensor to a NumPy array."""
        return np.asarray(array.cpu())

    def column_norm(self, weight: Tensor) -> Vector:
        """Euclidean norm of each column."""
        return np.asarray(torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32).cpu(), dtype=np.float64)

    def quantile_threshold(self, sample: NDArray[np.float32], q: float) -> NDArray[np.float32]:
        """q-quantile of each neuron's sampled signal (the order statistic at or above it)."""
        tfidf.check_quantile(q)
        rank = math.ceil(q * (len(sample) - 1)) + 1
        return np.asarray(kth_smallest(self._sample(sample).T.contiguous(), rank).flatten().cpu())

    def _membership(self, labels: NDArray[np.int64], groups: int) -> Tensor:
        return (self._tensor(labels) == torch.arange(groups, device=self.device)[:, None]).float()

    def active_tokens(
        self, sample: NDArray[np.float32], tau: NDArray[np.float32], labels: NDArray[np.int64], groups: int
    ) -> Counts:
        """Tokens of each group at or above the threshold; float32 counts exactly up to 2^24 tokens."""
        fires = (self._sample(sample) >= self._tensor(tau)).float()
        return np.asarray((self._membership(labels, groups) @ fires).cpu()).astype(np.int64)

    def group_means(self, sample: NDArray[np.float32], labels: NDArray[np.int64], groups: int) -> Vector:
        """Mean signal of each group's tokens."""
        member = self._membership(labels, groups)
        means = member @ self._sample(sample) / member.sum(1, keepdim=True).clamp(min=1)
        return np.asarray(means.cpu(), dtype=np.float64)

    def topics(self, sample: NDArray[np.float32], k: int, seed: int) -> NDArray[np.int64]:
        """Cosine k-means on a random projection, with the core's random numbers."""
        projection, initial = kmeans.topic_draws(sample.shape[0], sample.shape[1], k, seed)
        rows = unit_rows(self._sample(sample) @ self._tensor(projection))
        return np.asarray(spherical_kmeans(rows, rows[self._tensor(initial)])[0].cpu())

    def lowest_k(self, scores: Tensor, k: int) -> Tensor:
        """Mark the k lowest scores of every row; ties go to the lowest index."""
        if k == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        kth = kth_smallest(scores, k)
        if not scores.is_cpu:  # More work than below, but the host does not wait for the device.
            ties, below = scores == kth, scores < kth
            return below | (ties & (ties.cumsum(1, dtype=torch.int32) <= k - below.sum(1, keepdim=True)))
        mask = scores <= kth
        surplus = mask.count_nonzero(1) - k
        crowded = surplus.nonzero().flatten()
        if len(crowded):
            ties = scores[crowded] == kth[crowded]
            rank_from_last = ties.sum(1, keepdim=True) - ties.cumsum(1, dtype=torch.int32)
            mask[crowded] &= ~(ties & (rank_from_last < surplus[crowded, None]))
        return mask


def kth_smallest(rows: Tensor, k: int) -> Tensor:
    """k-th smallest value of each row, counted from 1, shape (rows, 1)."""
    if rows.is_cpu:  # On a CPU, NumPy's partition is more than twice as fast as torch's kthvalue.
        return torch.from_numpy(np.partition(rows.numpy(), k - 1, axis=1)[:, k - 1 : k])
    return rows.kthvalue(k, dim=1, keepdim=True).values


def token_blocks(activation: Tensor) -> tuple[Tensor, ...]:
    """Split a (documents, tokens, features) activation into blocks of tokens, for reductions with temporaries.

    On a CPU, the blocks are small enough for the temporaries to stay in the cache, which halves the time; elsewhere
    there is one block. Never split by document, so that a document's sums do not depend on the rest of the micro-batch.
    """
    blocks = math.ceil(activation.shape[1] / BLOCK_TOKENS) if activation.is_cpu else 1
    return activation.chunk(blocks, dim=1)


def mean_square(activation: Tensor) -> Tensor:
    """Mean square over each document's tokens, float32, shape (documents, features)."""
    sums = [block.float().square().sum(dim=1) for block in token_blocks(activation)]
    return torch.stack(sums).sum(dim=0) / activation.shape[1]


def signal_moments(activation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, mean square and peak of the magnitude over each document's tokens, float32, shape (documents, neurons)."""
    sums, squares, peaks = [], [], []
    for block in token_blocks(activation):
        a = block.abs().float()
        sums.append(a.sum(dim=1))
        peaks.append(a.amax(dim=1))
        squares.append(a.square_().sum(dim=1))
    tokens = activation.shape[1]
    return (
        torch.stack(sums).sum(dim=0) / tokens,
        torch.stack(squares).sum(dim=0) / tokens,
        torch.stack(peaks).amax(dim=0),
    )


def open_gates(gate: Tensor, threshold: float) -> Tensor:
    """Tokens of each document at which the gate exceeds the threshold, int64, shape (documents, neurons)."""
    # float32, because torch would round the threshold to the gate's precision; int32, because int64 sums of booleans
    # are ten times slower on a CPU.
    counts = [(block.float() > threshold).sum(dim=1, dtype=torch.int32) for block in token_blocks(gate)]
    return torch.stack(counts).sum(dim=0)


def head_signal(x: Tensor, o_proj: Tensor, heads: int) -> Tensor:
    """Norm of what each head adds at each token, float32, shape (..., tokens, heads).

    See :func:`neuronrank_core.statistics.heads.head_signal`.
    """
    parts = zip(x.chunk(heads, dim=-1), o_proj.chunk(heads, dim=1), strict=True)
    return torch.stack([(part.float() @ own.float().T).norm(dim=-1) for part, own in parts], dim=-1)


def expert_sums(routed: Tensor, gate: Tensor, norm: Tensor) -> dict[str, Tensor]:
    """See :func:`neuronrank_core.statistics.experts.expert_sums`; of each document, shape (documents, experts)."""
    return {
        "expert_tokens": routed.sum(dim=1),
        "expert_gate": gate.sum(dim=1),
        "expert_norm": norm.sum(dim=1),
        "expert_gated_norm": (gate * norm).sum(dim=1),
    }


def layer_signal(before: Tensor, after: Tensor) -> Tensor:
    """See :func:`neuronrank_core.statistics.layers.layer_signal`."""
    x, y = unit_rows(before), unit_rows(after)
    apart = x.any(dim=1) != y.any(dim=1)
    return torch.where(apart, 1.0, (x - y).square().sum(dim=1) / 2)


def inverse(matrix: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix, in double precision where the device computes it fast."""
    double = matrix if _slow_double(matrix.device) else matrix.double()
    return cholesky_inverse(double).to(matrix.dtype)


def cholesky_inverse(matrix: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix, in its own precision.

    In float32, the error is about 1e-6 of the largest element for Gram matrices with the damping of the update. A step
    of Newton's method would double it: its residual is rounded to float32 too, and in float64 costs more than it saves.
    """
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def _slow_double(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) not in FAST_DOUBLE
    return device.type == "mps"  # It has no double precision.


def unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to Euclidean length 1; zero rows stay zero, and a row with NaN or Inf has NaN."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(norm == 0, 0.0, rows / norm)


def spherical_kmeans(rows: Tensor, centroids: Tensor, iterations: int = kmeans.ITERATIONS) -> tuple[Tensor, Tensor]:
    """See :func:`neuronrank_core.statistics.topics.spherical_kmeans`."""
    for _ in range(iterations):
        member = assign(rows, centroids)[None, :] == torch.arange(len(centroids), device=rows.device)[:, None]
        sums = member.to(rows.dtype) @ rows
        moved = torch.linalg.vector_norm(sums, dim=1, keepdim=True) > 0
        centroids = torch.where(moved, unit_rows(sums), centroids)
    return assign(rows, centroids), centroids


def assign(rows: Tensor, centroids: Tensor) -> Tensor:
    """Centroid with the largest dot product for each row; ties go to the lowest index."""
    return first_largest(rows @ centroids.T)


def first_largest(rows: Tensor) -> Tensor:
    """Index of the largest value of each row; ties go to the lowest index, which torch's argmax does not guarantee."""
    index = torch.arange(rows.shape[1], device=rows.device)
    return torch.where(rows == rows.amax(dim=1, keepdim=True), index, rows.shape[1]).amin(dim=1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """See :func:`neuronrank_core.measures.kl_divergence`. In float32, the absolute error is up to about 1e-6 nats."""
    p = log_p.exp()
    terms = (log_p - log_q).mul_(p).masked_fill_(p == 0, 0.0)
    return terms.sum(dim=1).clamp_(min=0.0)


def same_top(a: Tensor, b: Tensor) -> Tensor:
    """See :func:`neuronrank_core.measures.same_top`."""
    return first_largest(a) == first_largest(b)
