"""Whether to correct gates that grow when experts are removed: perplexity with and without.

    python benchmarks/expert_gates.py --model out/grown-raw --texts out/grown-raw/texts --out out/gates.jsonl

For a model in the layout of Qwen3-MoE whose gates are not normalised over the chosen experts (``grow_mixture.py
--no-norm-topk-prob``). Without the removed experts, the softmax of a token divides by less, so each gate grows by
1 / (the share that the kept experts had). Corrections: none; ``down_proj`` of the experts of a layer times the mean of
that share over its gates; that of each expert times the mean over its own gates; and the share at each token, which no
checkpoint can hold. Means are over the calibration text, layer after layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from cells import add_cell, read_cells
from expert_removal import Dense, mixed, texts_of
from quality import recipe_for
from torch import Tensor

from neuronrank_torch.evaluation.perplexity import evaluate
from neuronrank_torch.model.open import load_model
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.text.sequences import calibration_sequences

METHODS = ("random", "reap", "neuronrank_wanda", "neuronrank_tfidf,tfidf_mode=topic,signal=product")
CORRECTIONS = ("none", "layer", "expert", "token")


def correct(layers: Any, routers: list[Tensor], kept: list[list[int]], run: Callable[[], Any], how: str) -> None:
    """Correct the experts of every layer; ``routers`` are the rows before removal, ``run`` runs the text."""
    for layer, router, stay in zip(layers, routers, kept, strict=True):
        experts = layer.mlp.experts
        sums = torch.zeros(2, len(stay))

        def see(_: Any, args: Any, router: Tensor = router, stay: Any = stay, sums: Tensor = sums) -> Any:
            hidden, chosen, factors = args
            share = (hidden @ router.T).softmax(1)[:, stay].sum(1, keepdim=True)
            if how == "token":
                return hidden, chosen, factors * share
            sums[0].index_add_(0, chosen.flatten(), (factors * share).flatten())
            sums[1].index_add_(0, chosen.flatten(), factors.flatten())
            return None

        hook = experts.register_forward_pre_hook(see)
        if how == "token":
            continue
        run()
        hook.remove()
        if how == "layer":
            sums = sums.sum(1, keepdim=True).expand(2, len(stay))
        scale = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1e-9), 1)
        experts.down_proj *= scale[:, None, None]


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True)
@click.option("--texts", "folder", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--mix", default="prose=1,code=1,docs=1")
@click.option("--method", "methods", multiple=True, default=METHODS)
@click.option("--ratio", "ratios", multiple=True, type=float, default=(0.25, 0.5))
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2))
@click.option("--nsamples", default=64)
@click.option("--seqlen", default=256)
@click.option("--windows", default=16)
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/gates.jsonl"))
@torch.no_grad()
def main(
    model: str,
    folder: Path,
    mix: str,
    methods: tuple[str, ...],
    ratios: tuple[float, ...],
    seeds: tuple[int, ...],
    nsamples: int,
    seqlen: int,
    windows: int,
    out: Path,
) -> None:
    """Measure every cell that is not there yet, then print the means over seeds."""
    loaded, tokenizer, _ = load_model(model)
    dense, routers = Dense(loaded, tokenizer), [layer.mlp.gate.weight.clone() for layer in loaded.model.layers]
    texts, held = (texts_of(folder, part) for part in ("train", "held"))
    text = mixed(texts, mix)
    setup = {"model": Path(model).name, "gates": mix, "calibrated on": f"{nsamples} x {seqlen}"}
    setup |= {"measured on": f"{windows} x {seqlen}", **versions()}
    cells = [cell for cell in read_cells(out) if cell["setup"] == setup]
    done = {(c["method"], c["ratio"], c["seed"], c["correction"]) for c in cells}
    for seed, ratio, method, how in itertools.product(seeds, ratios, methods, CORRECTIONS):
        if (method, ratio, seed, how) in done:
            continue
        recipe = recipe_for(method, str(ratio), "none", seed, nsamples=nsamples, seqlen=seqlen, sparsity_type="experts")
        pruned, kept = dense.pruned(recipe, text)
        sequences = calibration_sequences(tokenizer, recipe, text)
        if how != "none":
            body = pruned.model
            correct(body.layers, routers, kept, lambda: [body(one) for one in sequences[:16].split(4)], how)  # noqa: B023
        perplexity = {
            kind: evaluate(pruned, tokenizer, one, seqlen=seqlen, windows=windows, batch_size=4).perplexity
            for kind, one in held.items()
        }
        cells.append({"method": method, "ratio": ratio, "seed": seed, "correction": how, "perplexity": perplexity})
        add_cell(out, setup=setup, **cells[-1])
    kinds = [*held]
    click.echo("| removed, method, correction | " + " | ".join(kinds) + " |\n" + "| --- " * (len(kinds) + 1) + "|")
    for ratio, method, how in itertools.product(ratios, methods, CORRECTIONS):
        of = [c for c in cells if (c["method"], c["ratio"], c["correction"]) == (method, ratio, how)]
        means = (f"{sum(c['perplexity'][kind] for c in of) / len(of):.1f}" for kind in kinds)
        click.echo(f"| {ratio}, {method}, {how} | " + " | ".join(means) + " |")


if __name__ == "__main__":
    main()
