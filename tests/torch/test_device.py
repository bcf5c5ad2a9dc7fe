"""Nothing mixes devices: whole runs on a device that is not the CPU, with the results of a CPU."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from backends import signal
from fake_gpu import EXISTS, NEED_VALUES, fake_gpu, moved, values
from layers import random_row
from plain import plain
from pruning import TEXT, pruned, recipe, small
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from tiny_files import write_folder
from torch import nn

from neuronrank_core import InputError, NeuronStatistics, Recipe
from neuronrank_core.methods import METHODS
from neuronrank_torch import Job, TorchKernels, run_prune
from neuronrank_torch.distributed.process_group import ProcessGroup
from neuronrank_torch.evaluation.windows import Evaluated, score_windows
from neuronrank_torch.model.device import check_device
from neuronrank_torch.runs.verify.checks import check_layer
from neuronrank_torch.runs.verify.reference import observe
from neuronrank_torch.text.sequences import calibration_sequences

pytestmark = pytest.mark.skipif(not EXISTS, reason="torch cannot register a device in Python, or has CUDA")
RECIPES: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    "topics": {"method": "neuronrank_tfidf", "tfidf_mode": "topic", "signal": "activated"},
    "every statistic": {"tfidf_mode": "topic", "idf_exp": 1.0, "spikiness_exp": 1.0, "tf_exp": 1.0},
    "pattern": {"sparsity_type": "2:4", "propagate": "dense"},
    "update": {"update": "least-squares", "include_attention": True},
    "gradual": {"update": "gradual", "update_iterations": 4},
    "neurons": {"sparsity_type": "neurons", "update": "least-squares"},
    "allocate": {"allocate": "neuronrank"},
    "heads": {"sparsity_type": "key-value-groups", "update": "least-squares"},
    "layers": {"sparsity_type": "layers", "update": "least-squares"},
    "block influence": {"sparsity_type": "layers-by-influence"},
}


@pytest.fixture
def device() -> Iterator[str]:
    with fake_gpu() as name:
        yield name


def model(kind: str = "llama") -> Any:
    """A model that computes attention by the same operations on every device."""
    built = plain(kind) if kind == "gpt_neox" else small(kind)  # type: ignore[arg-type]
    built.set_attn_implementation("eager")
    built.config._experts_implementation = "eager"
    return built


def same(cpu: nn.Module, gpu: nn.Module) -> None:
    """Zeros are where they are on a CPU, and the weights are its own up to rounding."""
    for (name, a), b in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        assert b.device.type == "fakegpu", name
        assert torch.equal(a == 0, values(b) == 0), name
        torch.testing.assert_close(a.detach(), values(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chosen", RECIPES.values(), ids=RECIPES)
def test_a_prune(device: str, chosen: dict[str, Any]) -> None:
    cpu = model()
    gpu = moved(copy.deepcopy(cpu), device)
    before = sum(p.count_nonzero() for p in cpu.parameters())
    pruned(cpu, recipe(**chosen))
    pruned(gpu, recipe(**chosen))
    assert sum(p.count_nonzero() for p in cpu.parameters()) < before
    same(cpu, gpu)


@pytest.mark.parametrize(("kind", "update"), [("qwen3_moe", "none"), ("gpt_neox", "none"), ("gpt_neox", "gradual")])
def test_other_blocks(device: str, kind: str, update: str) -> None:
    cpu = model(kind)
    gpu = moved(copy.deepcopy(cpu), device)
    chosen = recipe(update=update, idf_exp=1.0)
    pruned(cpu, chosen)
    pruned(gpu, chosen)
    same(cpu, gpu)


def test_the_head(device: str) -> None:
    cpu = tiny_model("llama", layers=2, hidden=32, intermediate=64, tied=False)
    cpu.set_attn_implementation("eager")
    gpu = moved(copy.deepcopy(cpu), device)
    for each in (cpu, gpu):
        pruned(each, recipe(prune_lm_head=True))
    same(cpu, gpu)


@torch.no_grad()
def test_verify(device: str) -> None:
    chosen = Recipe(tfidf_mode="topic", idf_exp=1.0, spikiness_exp=1.0, nsamples=4, seqlen=32, tfidf_k=8)
    gpu, seen = moved(model(), device), []
    sequences = calibration_sequences(tiny_tokenizer(), chosen, TEXT).to(device)
    observe(gpu, sequences, chosen, layers=2, batch_size=2, look=lambda o: seen.extend(check_layer(o, chosen)))
    assert len(seen) > 20
    assert all(check.holds for check in seen)


def test_two_models_side_by_side(device: str) -> None:
    a, b = model(), model()
    with torch.no_grad():
        b.model.layers[0].mlp.down_proj.weight.mul_(1.1)
    windows = np.arange(3 * 40).reshape(3, 40) % 250
    on_cpu = score_windows([Evaluated(a), Evaluated(b)], windows)
    on_gpu = score_windows([Evaluated(moved(copy.deepcopy(m), device)) for m in (a, b)], windows)
    for x, y in zip(on_cpu, on_gpu, strict=True):
        assert x.nll == pytest.approx(y.nll, rel=1e-5)
        np.testing.assert_allclose(x.kl, y.kl, atol=1e-6)


@pytest.mark.parametrize("hidden_states", ["memory", "disk"])
def test_a_streamed_run_writes_what_it_writes_on_a_cpu(device: str, tmp_path: Path, hidden_states: Any) -> None:
    source, text = write_folder(tmp_path / "source"), tmp_path / "text"
    text.write_text(TEXT)
    files = {}
    for where in ("cpu", device):
        save = tmp_path / where[:3]
        job = Job(model=str(source), save=str(save), dataset=str(text), device=where, hidden_states=hidden_states)
        run_prune(job, recipe())
        files[where] = load_file(save / "model.safetensors")
    for name, tensor in files["cpu"].items():
        assert torch.equal(tensor == 0, files[device][name] == 0), name


def test_processes_that_share_a_gpu_send_by_way_of_the_cpu(device: str) -> None:
    group = ProcessGroup()
    group._direct = group._broken = False
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        total = group.sum_in_order(torch.ones(3, 2).to(device))
    finally:
        dist.destroy_process_group()
    assert total.device.type == "fakegpu"
    assert values(total).tolist() == [[1, 1]] * 3


def test_a_sample_is_copied_once_and_freed_with_the_table(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[tuple[int, ...]] = []
    tensor = TorchKernels._tensor
    monkeypatch.setattr(TorchKernels, "_tensor", lambda self, a: (copied.append(a.shape), tensor(self, a))[1])
    kernels, chosen = TorchKernels(device), Recipe(tfidf_mode="topic", tfidf_k=8)
    rows = signal(0, 90, 40, whole=False)
    one, two = (random_row(np.random.default_rng(i), i, 60) for i in (0, 1))
    for table in (one, two, one):
        found, core = NeuronStatistics(table, chosen, kernels), NeuronStatistics(table, chosen)
        assert np.array_equal(found.df, core.df)
        np.testing.assert_allclose(found.tf, core.tf, rtol=1e-5)
    assert copied.count(one.sample.shape) == 3
    tau = kernels.quantile_threshold(rows, 0.5)
    held = weakref.ref(kernels._held[1])
    kernels.active_tokens(rows, tau, np.zeros(90, int), 1)
    assert copied.count((90, 40)) == 1
    del rows
    gc.collect()
    assert held() is None


def test_a_device_that_exists_only_in_part_is_refused(device: str) -> None:
    assert str(check_device(device)) == device
    with pytest.raises(InputError, match="not available"):
        check_device("cuda:0")


class TestTheDevice:
    """The fake device refuses what a GPU refuses."""

    @pytest.mark.parametrize(
        "mixing",
        [
            lambda x, y: x + y,
            lambda x, y: x @ y,
            lambda x, y: x.addmm_(y, y),
            lambda x, y: torch.where(x > 0, x, y),
            lambda x, y: torch.cat([x, y]),
            lambda x, y: x.masked_fill_(y > 0, 0),
            lambda x, y: torch.equal(x, y),
            lambda x, y: y[x > 0],
            lambda x, y: y[x.long() % 3],
            lambda x, y: x.index_select(0, torch.arange(2)),
            lambda x, y: np.asarray(x),
        ],
    )
    def test_mixed_devices_raise(self, device: str, mixing: Any) -> None:
        x = torch.rand(3, 3)
        with pytest.raises((RuntimeError, TypeError)):
            mixing(x.to(device), x)

    def test_few_operations_are_not_judged(self) -> None:
        assert len(NEED_VALUES) <= 10
