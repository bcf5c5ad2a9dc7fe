"""What removing whole neurons gives: parameters, file size, and tokens per second, before and after.

    python benchmarks/neurons.py --calibrate valid.txt --ratio 0.2 --out out/neurons.json

Both models are saved and loaded by plain transformers, and measured in turn, as by ``neuronrank compare --speed``.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from cells import add_cell
from transformers import AutoModelForCausalLM

from neuronrank_core import Recipe
from neuronrank_torch import prune
from neuronrank_torch.evaluation.speed import compare_speed
from neuronrank_torch.model.open import load_model
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.text.sources import load_text


@click.command(context_settings={"show_default": True})
@click.option("--model", default="builtin:smollm2-135m")
@click.option("--calibrate", required=True, help="Calibration text.")
@click.option("--ratio", default=0.2, help="Share of each layer's neurons to remove.")
@click.option("--nsamples", default=32)
@click.option("--seqlen", default=512)
@click.option("--out", type=click.Path(path_type=Path), help="Add the result to this file of JSON lines.")
def main(model: str, calibrate: str, ratio: float, nsamples: int, seqlen: int, out: Path | None) -> None:
    """Remove neurons, then compare the two models."""
    loaded, tokenizer, _ = load_model(model)
    text = load_text(calibrate, "calibration")
    recipe = Recipe(
        sparsity_type="neurons", sparsity_ratio=ratio, update="least-squares", nsamples=nsamples, seqlen=seqlen
    )
    with tempfile.TemporaryDirectory() as place:
        folders = {"dense": Path(place, "dense"), "pruned": Path(place, "pruned")}
        loaded.save_pretrained(folders["dense"])
        prune(loaded, tokenizer, recipe, text)
        loaded.save_pretrained(folders["pruned"])
        models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in folders.items()}
        sizes = {name: (folder / "model.safetensors").stat().st_size for name, folder in folders.items()}
    speeds, speed_up = compare_speed(list(models.values()), seqlen, 1)
    result: dict[str, Any] = {
        "model": model,
        "ratio": ratio,
        "parameters": {name: it.num_parameters() for name, it in models.items()},
        "bytes": sizes,
        "speed_up": {task: asdict(by) for task, by in speed_up.items()},
        "tokens_per_second": {name: asdict(speed) for name, speed in zip(models, speeds, strict=True)},
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    click.echo(json.dumps(result, indent=2))
    if out is not None:
        add_cell(out, **result)


if __name__ == "__main__":
    main()
