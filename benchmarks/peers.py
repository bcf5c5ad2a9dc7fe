r"""NeuronRank beside ALPS, SparseGPT, Wanda and RIA: perplexity and time on the same sequences and windows.

    python benchmarks/peers.py --calibrate valid.txt --evaluate test.txt --out out/peers.jsonl \
        --alps ALPS --sparsegpt sparsegpt --llmcompressor-python venv/bin/python

ALPS and SparseGPT are run from checkouts of github.com/mazumder-lab/ALPS and github.com/IST-DASLab/sparsegpt,
llm-compressor's SparseGPT by the Python of an environment that has it (0.14 wants an older transformers than ours).
What is not given is left out. Every cell is a process of its own (``peer.py``), with the threads that OMP_NUM_THREADS
allows; the methods take turns at each sparsity, so that a busy machine slows all alike. All prune the MLPs alone, and
this process evaluates them all. Cells have the form of ``quality.py``; those that are there are not run again.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from cells import add_cell, read_cells, setup_of
from quality import key_of, markdown
from safetensors.torch import load_file

from neuronrank_torch.evaluation.perplexity import evaluate
from neuronrank_torch.model.open import load_model
from neuronrank_torch.text.sources import load_text

#: Method and update. RIA's code compares within the whole matrix unless told to compare within rows, as the paper does.
OURS = (
    ("neuronrank_wanda", "gradual"),
    ("wanda", "gradual"),
    ("neuronrank_wanda", "none"),
    ("wanda", "none"),
    ("ria,compare=row", "none"),
    ("ria,compare=module", "none"),
)
#: By the option that says where they are; llm-compressor's beside ours, whose times are compared.
PEERS = {"llmcompressor_python": "llm-compressor SparseGPT", "sparsegpt": "SparseGPT", "alps": "ALPS"}
BEST = ("neuronrank_wanda", "effort best")
#: Every process runs the code of this repository.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
#: What is tabulated besides perplexity.
MEASURES = {"seconds": "Wall seconds", "cpu_seconds": "CPU seconds"}


@click.command(context_settings={"show_default": True})
@click.option("--model", default="builtin:smollm2-135m")
@click.option("--calibrate", required=True, help="Calibration text.")
@click.option("--evaluate", "evaluate_on", required=True, help="Evaluation text; never the calibration text.")
@click.option("--alps", help="Checkout of ALPS.")
@click.option("--sparsegpt", help="Checkout of SparseGPT.")
@click.option("--llmcompressor-python", help="Python of an environment with llm-compressor and what NeuronRank needs.")
@click.option("--best", is_flag=True, help="Also --effort best.")
@click.option("--method", "names", multiple=True, help="Only these: a method, or a method and its update.")
@click.option("--sparsity", "sparsities", multiple=True, default=("0.5", "0.6", "0.7", "2:4", "4:8"))
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,))
@click.option("--nsamples", default=32)
@click.option("--seqlen", default=512)
@click.option("--windows", default=24)
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/peers.jsonl"))
def main(
    model: str,
    calibrate: str,
    evaluate_on: str,
    sparsities: tuple[str, ...],
    seeds: tuple[int, ...],
    out: Path,
    nsamples: int,
    seqlen: int,
    windows: int,
    best: bool,
    names: tuple[str, ...],
    **given: str | None,
) -> None:
    """Measure every cell that is not there yet, then print the tables."""
    dense, tokenizer, _ = load_model(model)
    held_out = load_text(evaluate_on, "evaluation")
    texts = load_text(calibrate, "calibration"), held_out
    setup = setup_of(model, calibrate, evaluate_on, texts, nsamples, seqlen, windows)
    peers = {(name, "its own"): place for option, name in PEERS.items() if (place := given[option])}
    methods = [*[BEST][: int(best)], *OURS[:1], *peers, *OURS[1:]]
    methods = [method for method in methods if not names or method[0] in names or " ".join(method) in names]
    done = {key_of(cell) for cell in read_cells(out) if cell["setup"] == setup}
    if ("dense", "0", "none", 0) not in done:
        perplexity = evaluate(dense, tokenizer, held_out, seqlen=seqlen, windows=windows).perplexity
        add_cell(out, setup=setup, method="dense", sparsity="0", update="none", seed=0, perplexity=perplexity)
    drawn: dict[int, str] = {}
    for seed, sparsity, (method, update) in itertools.product(seeds, sparsities, methods):
        if (method, sparsity, update, seed) in done:
            continue
        peer = peers.get((method, update), "")
        python = peer if method.startswith("llm-compressor") else sys.executable
        with tempfile.TemporaryDirectory() as folder:
            weights = str(Path(folder, "pruned.safetensors"))
            task = {"method": method, "update": update, "sparsity": sparsity, "model": model, "calibrate": calibrate}
            task |= {"weights": weights, "peer": peer, "seed": seed, "nsamples": nsamples, "seqlen": seqlen}
            command = [python, str(Path(__file__).with_name("peer.py")), json.dumps(task)]
            printed = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True).stdout
            target = copy.deepcopy(dense)
            for name, weight in load_file(weights).items():
                target.get_submodule(name).weight.data.copy_(weight)
        result = json.loads(printed.splitlines()[-1])
        if drawn.setdefault(seed, result["sequences"]) != result["sequences"]:
            raise click.ClickException(f"{method} drew other calibration sequences than the methods before it")
        perplexity = evaluate(target, tokenizer, held_out, seqlen=seqlen, windows=windows).perplexity
        cell = {"method": method, "sparsity": sparsity, "update": update, "seed": seed, "perplexity": perplexity}
        add_cell(out, setup=setup, **cell, **result)
        times = f"{result['seconds']:.1f} s, {result['cpu_seconds']:.1f} s CPU"
        click.echo(f"{method} {update} {sparsity} seed {seed}: {perplexity:.2f}, {times}", err=True)
    click.echo(markdown(read_cells(out)))
    for measure, title in MEASURES.items():
        click.echo(f"\n{title}:\n{markdown(read_cells(out), measure)}")


if __name__ == "__main__":
    main()
