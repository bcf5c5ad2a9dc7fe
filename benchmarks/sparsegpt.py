"""SparseGPT and Wanda of llm-compressor on the calibration sequences and windows of ``quality.py``.

    python benchmarks/sparsegpt.py --calibrate valid.txt --evaluate test.txt --out out/sparsegpt.jsonl

To be run where llm-compressor is installed (0.14 wants an older transformers than ours: an environment of its own).
Cells have the form of ``quality.py``, which prints them with ``--table-only``; cells that are there are not run again.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from cells import add_cell, read_cells
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from quality import markdown

from neuronrank_core import Recipe
from neuronrank_torch.evaluation.perplexity import evaluate
from neuronrank_torch.model.open import load_model
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.text.sequences import calibration_sequences
from neuronrank_torch.text.sources import load_text, text_fingerprint

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def pruned(model: Any, tokenizer: Any, modifier: str, sparsity: str, sequences: torch.Tensor) -> Any:
    """A copy of a model whose MLP linears llm-compressor has pruned."""
    n, _, m = sparsity.partition(":")
    how = {"sparsity": int(n) / int(m), "mask_structure": sparsity} if m else {"sparsity": float(sparsity)}
    recipe = MODIFIERS[modifier](targets=[r"re:.*mlp\.(gate|up|down)_proj$"], **how)
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in sequences]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    target = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        # It looks for the configuration in the folder that a model came from, and ours came from one file.
        target.config.save_pretrained(folder)
        target.config.name_or_path = folder
        oneshot(
            model=target,
            processor=tokenizer,
            dataset=loader,
            recipe=recipe,
            num_calibration_samples=len(sequences),
            pipeline="sequential",
            clear_sparse_session=True,
        )
    return target


@click.command(context_settings={"show_default": True})
@click.option("--model", default="builtin:smollm2-135m")
@click.option("--calibrate", required=True, help="Calibration text.")
@click.option("--evaluate", "evaluate_on", required=True, help="Evaluation text; never the calibration text.")
@click.option("--modifier", "modifiers", multiple=True, default=("sparsegpt",), type=click.Choice(list(MODIFIERS)))
@click.option("--sparsity", "sparsities", multiple=True, default=("0.5", "0.6", "0.7", "2:4", "4:8"))
@click.option("--seed", default=0)
@click.option("--nsamples", default=32)
@click.option("--seqlen", default=512)
@click.option("--windows", default=24)
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/sparsegpt.jsonl"))
def main(
    model: str,
    calibrate: str,
    evaluate_on: str,
    modifiers: tuple[str, ...],
    sparsities: tuple[str, ...],
    seed: int,
    nsamples: int,
    seqlen: int,
    windows: int,
    out: Path,
) -> None:
    """Measure every cell that is not there yet, then print the table."""
    dense, tokenizer, _ = load_model(model)
    text, held_out = load_text(calibrate, "calibration"), load_text(evaluate_on, "evaluation")
    sequences = calibration_sequences(tokenizer, Recipe(nsamples=nsamples, seqlen=seqlen, seed=seed), text)
    setup = {
        "model": model,
        "calibrated on": f"{Path(calibrate).name} {text_fingerprint(text)[:8]}, {nsamples} x {seqlen}",
        "evaluated on": f"{Path(evaluate_on).name} {text_fingerprint(held_out)[:8]}, {windows} x {seqlen}",
        **versions(),
        "llmcompressor": version("llmcompressor"),
    }
    done = {(c["method"], c["sparsity"], c["seed"]) for c in read_cells(out) if c["setup"] == setup}
    for sparsity, modifier in itertools.product(sparsities, modifiers):
        method = f"llm-compressor {modifier}"
        if (method, sparsity, seed) in done:
            continue
        started = time.perf_counter()
        target = pruned(dense, tokenizer, modifier, sparsity, sequences)
        seconds = time.perf_counter() - started
        perplexity = evaluate(target, tokenizer, held_out, seqlen=seqlen, windows=windows).perplexity
        cell = {"method": method, "sparsity": sparsity, "update": "none", "seed": seed, "perplexity": perplexity}
        add_cell(out, setup=setup, **cell, seconds=seconds)
        click.echo(f"{method} {sparsity}: {perplexity:.2f}", err=True)
    click.echo(markdown(read_cells(out)))


if __name__ == "__main__":
    main()
