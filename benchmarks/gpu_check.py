"""Whether a GPU computes what the reference does, and at what cost: one command, one JSON file, one page.

    python benchmarks/gpu_check.py --out out/gpu-check

It needs nothing but this repository and what the interpreter already has: what a step imports and is not there makes
that step fail. Without CUDA it rehearses: everything runs on
the CPU with small shapes. A step that fails is reported and does not stop the others; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_kernels import (
    CUDA,
    DEVICE,
    WIDE,
    Result,
    check_kernels,
    check_operations,
    check_tf32,
    differing,
    peak,
    phases,
    tensors,
)
from low_memory import llama_config, write_model

from neuronrank_core import Recipe
from neuronrank_torch.model import streaming
from neuronrank_torch.model.open import load_model
from neuronrank_torch.pruning.prune import prune
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.text.sources import load_text

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("float32", "bfloat16", "float16")
SMOLLM2 = "builtin:smollm2-135m"
#: Shape of SmolLM2-135M: layers, hidden, intermediate, vocabulary, heads. The rehearsal's is smaller.
SMALL = (30, 576, 1536, 49152, 9) if CUDA else (3, 96, 256, 512, 3)
#: Sequences and tokens of the text of a layer of LLaMA 7B.
WIDE_TEXT = (32, 2048) if CUDA else (8, 64)
#: Calibration text of the other prunes.
TEXT = {"nsamples": 16, "seqlen": 256} if CUDA else {"nsamples": 4, "seqlen": 64}
#: Share of mask bits that may differ between CPU and GPU, whose forward passes round differently.
DIFFER = 1e-3


def check_tests() -> Result:
    """The backend-parametrised tests of the repository, where there is pytest; the kernel checks run in any case."""
    if not all(map(importlib.util.find_spec, ("pytest", "hypothesis"))):
        return {"skipped": "no pytest or no hypothesis here"}
    files = sorted(map(str, (ROOT / "tests" / "torch").glob("test_kernels_*.py")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    done = subprocess.run([*command, "-k", DEVICE, *files], cwd=ROOT, capture_output=True, text=True, timeout=240)
    return {"last line": done.stdout.strip().splitlines()[-1], "ok": done.returncode == 0}


def check_verify(model: str, dtype: Any) -> Result:
    """The command ``neuronrank verify``."""
    from neuronrank_torch.runs.verify.run import run_verify

    verified = run_verify(model, device=DEVICE, dtype=dtype, layers=6, seqlen=TEXT["seqlen"])
    broken = sorted({name for of in verified.layers for name, check in of.checks.items() if not check.holds})
    return {"layers": len(verified.layers), "broken": broken, "ok": verified.holds}


def in_memory(model: str, device: str, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The tensors of a model pruned in memory."""
    loaded, tokenizer, _ = load_model(model, dtype="float32", device=device)
    prune(loaded, tokenizer, recipe, load_text("builtin", "calibration"))
    return {name: tensor.cpu() for name, tensor in loaded.state_dict().items()}


def check_cpu(model: str, chosen: Result) -> Result:
    """A prune on the CPU and one on the device."""
    recipe = Recipe(**TEXT, **chosen)
    result = differing(*(in_memory(model, device, recipe) for device in ("cpu", DEVICE)))
    return {**result, "ok": result["bits that differ"] <= DIFFER * result["mask bits"]}


def streamed(model: str, save: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The tensors of a model pruned and saved one layer at a time."""
    from neuronrank_torch.runs.job import Job
    from neuronrank_torch.runs.prune import run_prune

    run_prune(Job(model=model, save=str(save), dtype="float32", device=DEVICE), recipe)
    return tensors(save)


def check_streamed(model: str, work: Path) -> Result:
    """Streamed, with and without copying the next layer early, against in memory."""
    recipe, result, files = Recipe(**TEXT), {}, []
    for early in ("on", "off"):
        devices = (DEVICE,) if early == "on" else ()
        started = time.perf_counter()
        with patch.object(streaming, "READS_AHEAD", devices), phases() as found:
            files.append(streamed(model, work / f"streamed-{early}", recipe))
        result[f"prefetch {early}"] = {"seconds": round(time.perf_counter() - started, 2), **found}
    whole = in_memory(model, DEVICE, recipe)
    compared = [differing({name: whole[name] for name in of}, of) for of in files]
    return {**result, **compared[0], "ok": not any(of["tensors that differ"] for of in compared)}


def check_wide(update: str) -> Result:
    """One layer with the width of LLaMA 7B, in bfloat16."""
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place, "model"), llama_config(1, *WIDE, 512, WIDE[0] // 128))
        loaded, tokenizer, _ = load_model(str(Path(place, "model")), dtype="bfloat16", device=DEVICE)
    recipe = Recipe(nsamples=WIDE_TEXT[0], seqlen=WIDE_TEXT[1], update=update)
    with phases() as found:
        report = prune(loaded, tokenizer, recipe, load_text("builtin", "calibration"))
    return {
        "shape": list(WIDE),
        "seconds": report.seconds,
        **found,
        "ok": report.total.zeros > 0.45 * report.total.prunable,
    }


def check_ranks(model: str, work: Path) -> Result:
    """Two processes on one device, against one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    command += ["--rank-of", model, "--out", str(work / "ranks")]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=240)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    result = differing(streamed(model, work / "alone", Recipe(**TEXT, update="least-squares")), tensors(work / "ranks"))
    return {**result, "ok": result["bits that differ"] <= DIFFER * result["mask bits"]}


def found_or_random(folder: Path) -> str:
    """SmolLM2 where it can be read, otherwise, and in a rehearsal, the folder of a random model."""
    if CUDA:
        try:
            load_model(SMOLLM2, device="cpu")
            return SMOLLM2
        except Exception as error:  # Packages that read it may be missing or old.
            print(f"random model of the shape of SmolLM2: {error}", flush=True)
    write_model(folder, llama_config(*SMALL))
    return str(folder)


def steps(model: str, work: Path) -> dict[str, Callable[[], Result]]:
    """All steps by name, in order."""
    updates = {"none": {}, "least-squares": {"update": "least-squares"}}
    return {
        "tests": check_tests,
        **{f"kernels, {dtype}": partial(check_kernels, dtype) for dtype in DTYPES},
        "TF32": check_tf32,
        "operations of a 7B layer": check_operations,
        **{f"verify, {dtype}": partial(check_verify, model, dtype) for dtype in DTYPES},
        "CPU and device": partial(check_cpu, model, {}),
        "streamed and in memory": partial(check_streamed, model, work),
        "two ranks on one device": partial(check_ranks, model, work),
        **{f"7B layer, update {name}": partial(check_wide, name) for name in (*updates, "gradual")},
        "CPU and device, update": partial(check_cpu, model, updates["least-squares"]),
    }


def run(name: str, step: Callable[[], Result], deadline: float) -> Result:
    """A step's result; what went wrong in it, if something did."""
    if time.monotonic() > deadline:
        return {"ok": False, "error": "not started: the time was up"}
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        result = {"ok": True, **step()}
    except Exception as error:  # A failing step must not stop the others, whatever it raises.
        result = {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    print(f"{'ok    ' if result['ok'] else 'FAILED'} {name}: {time.perf_counter() - started:.1f} s", flush=True)
    return {"took": round(time.perf_counter() - started, 2), "peak GiB": peak(), **result}


def plain(value: Any) -> str:
    """A value as text in a table."""
    if isinstance(value, dict):
        if value.keys() == {"seconds", "GiB"}:
            return f"{value['seconds']} s, {value['GiB']} GiB"
        return "(" + "; ".join(f"{key} {plain(each)}" for key, each in value.items()) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(report: Result) -> str:
    """The page."""
    setup = "\n".join(f"- {key}: {value}" for key, value in report["setup"].items())
    lines = ["| step | result | seconds | peak GiB | found |", "| --- " * 5 + "|"]
    for name, result in report["steps"].items():
        hidden = ("ok", "took", "peak GiB", "traceback")
        found = "; ".join(f"{key}: {plain(value)}" for key, value in result.items() if key not in hidden)
        cells = (name, "ok" if result["ok"] else "**FAILED**", result.get("took", ""), result.get("peak GiB", ""))
        lines.append("| " + " | ".join(map(str, cells)) + f" | {' '.join(found.replace('|', '/').split())} |")
    return f"# {report['title']}\n\n{setup}\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    """Run every step, write the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, GGUF file or name; by default SmolLM2, or a random model of its shape")
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="where to write FILE.json and FILE.md")
    parser.add_argument("--seconds", type=float, default=440, help="start no step after this time")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        streamed(options.rank_of, options.out, Recipe(**TEXT, update="least-squares"))
        return 0
    began = time.monotonic()
    title = f"GPU check: {torch.cuda.get_device_name()}" if CUDA else "GPU check: REHEARSAL on the CPU, small shapes"
    print(title, flush=True)
    with tempfile.TemporaryDirectory() as place:
        model = options.model or found_or_random(Path(place, "model"))
        deadline = began + (options.seconds if CUDA else 3 * options.seconds)
        done = {name: run(name, step, deadline) for name, step in steps(model, Path(place)).items()}
    failed = [name for name, result in done.items() if not result["ok"]]
    setup = {
        "model": model if options.model or model == SMOLLM2 else f"random, {SMALL}",
        "device": DEVICE,
        "threads": torch.get_num_threads(),
    }
    setup |= {"seconds": round(time.monotonic() - began), "failed": ", ".join(failed) or "nothing", **versions()}
    report = {"title": title, "rehearsal": not CUDA, "setup": setup, "steps": done}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    options.out.with_suffix(".md").write_text(markdown(report))
    print(f"{title}. Failed: {setup['failed']}. Report: {options.out}.md, {options.out}.json")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
