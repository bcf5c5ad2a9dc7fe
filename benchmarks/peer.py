"""Prunes a model by one method, ours or another project's, in a process of its own: the worker of ``peers.py``.

    python benchmarks/peer.py '{"method": "wanda", "update": "none", ...}'

The keys are the arguments of :func:`main`. Writes the pruned MLP weights to a file and prints one line of JSON. The
time includes everything from drawing the calibration sequences to the pruned model in memory, but no loading. The
solvers of ALPS and SparseGPT are run from unmodified checkouts, one pass of the text per layer, as their own
``llama.py`` does it: all Gram matrices of a layer from its dense modules, on the outputs of the pruned earlier layers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from quality import recipe_for
from safetensors.torch import save_file
from torch import Tensor, nn

from neuronrank_core import Recipe
from neuronrank_core.effort import candidates
from neuronrank_torch import find_decoder, prune
from neuronrank_torch.calibration.layerwise import LayerRun, run_layers
from neuronrank_torch.model.open import load_model, open_model
from neuronrank_torch.model.structure import Layer
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.runs.choice import compare_recipes
from neuronrank_torch.text.sequences import calibration_sequences, micro_batch
from neuronrank_torch.text.sources import load_text

#: Where the solver of a checkout is.
FILES = {"ALPS": "alps.py", "SparseGPT": "sparsegpt.py"}


def mlp_linears(model: nn.Module, layers: Iterable[Layer] | None = None) -> dict[str, nn.Linear]:
    """The linear layers of the MLPs (by default of all layers) by name in ``model``: what every method prunes."""
    layers = find_decoder(model).layers if layers is None else layers
    wanted = {id(p.module) for layer in layers for mlp in layer.mlps for p in mlp.projections.values()}
    return {name: module for name, module in model.named_modules() if id(module) in wanted}


def solvers_of(checkout: str, file: str) -> ModuleType:
    """A module of another project, on the CPU: devices are named in its text."""
    sys.path.append(checkout)
    module = ModuleType(Path(file).stem)
    exec(compile((Path(checkout) / file).read_text().replace("cuda:0", "cpu"), file, "exec"), module.__dict__)
    return module


def solver_of(theirs: ModuleType, linear: nn.Linear, recipe: Recipe) -> tuple[Any, Callable[[], object]]:
    """ALPS or SparseGPT for one linear layer, with the settings of its ``llama.py``, and how it prunes."""
    n, m = recipe.pattern or (0, 0)
    if hasattr(theirs, "SparseGPT"):
        solver = theirs.SparseGPT(linear)
        return solver, lambda: solver.fasterprune(recipe.ratio, prunen=n, prunem=m)
    solver = theirs.ALPS_prune(linear, nsamples=recipe.nsamples, seqlen=recipe.seqlen)
    # Its N of N:M counts the weights that stay.
    return solver, lambda: solver.ALPS_admm(sp=recipe.ratio, nm_n=m - n, nm_m=m, rho=0.1)


def by_solver(model: Any, sequences: Tensor, recipe: Recipe, theirs: ModuleType) -> None:
    """Prune layer by layer: one pass collects, the solvers prune, one pass propagates."""
    decoder = find_decoder(model)

    def visit(run: LayerRun) -> None:
        solvers = [solver_of(theirs, linear, recipe) for linear in mlp_linears(run.layer.module, [run.layer]).values()]
        hooks = [
            solver.layer.register_forward_hook(lambda _, x, y, add=solver.add_batch: add(x[0].data, y.data))
            for solver, _ in solvers
        ]
        run.feed(keep=False)
        for hook in hooks:
            hook.remove()
        for solver, solve in solvers:
            solve()
            solver.free()
        if run.index < len(decoder.layers) - 1:
            run.feed(keep=True)

    with torch.no_grad():
        run_layers(decoder, sequences, visit, batch_size=micro_batch(recipe))


def by_llmcompressor(model: Any, tokenizer: Any, sequences: Tensor, recipe: Recipe) -> None:
    """SparseGPT of llm-compressor."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    pattern = {"mask_structure": recipe.sparsity_type} if recipe.pattern else {}
    modifier = SparseGPTModifier(targets=list(mlp_linears(model)), sparsity=recipe.ratio, **pattern)
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in sequences]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    with tempfile.TemporaryDirectory() as folder:
        # It looks for the configuration in the folder that a model came from, and ours came from one file.
        model.config.save_pretrained(folder)
        model.config.name_or_path = folder
        how = {"pipeline": "sequential", "num_calibration_samples": len(sequences), "clear_sparse_session": True}
        oneshot(model=model, processor=tokenizer, dataset=loader, recipe=modifier, **how)


def main(
    method: str, update: str, sparsity: str, model: str, calibrate: str, weights: str, peer: str, **calibration: int
) -> None:
    """Prune; ``calibration`` is the seed and the size, ``peer`` the checkout of the other project."""
    ours = update in ("none", "gradual", "least-squares", "effort best")
    name, how = (method, "gradual" if update == "effort best" else update) if ours else ("wanda", "none")
    recipe = recipe_for(name, sparsity, how, **calibration)
    target, tokenizer, _ = load_model(model)
    text = load_text(calibrate, "calibration")
    wall, cpu = time.perf_counter(), time.process_time()
    sequences = calibration_sequences(tokenizer, recipe, text)
    compared: dict[str, Any] = {}
    with patch("torch.cuda.synchronize"), contextlib.redirect_stdout(sys.stderr):
        if method in FILES:
            by_solver(target, sequences, recipe, solvers_of(peer, FILES[method]))
        elif method == "llm-compressor SparseGPT":
            by_llmcompressor(target, tokenizer, sequences, recipe)
        elif update == "effort best":
            recipes = candidates(recipe)
            if len(recipes) > 1:
                reopen = open_model(model)[0].reopener()
                choice = compare_recipes(reopen, tokenizer, recipes, text, lambda name, measure: measure())
                recipe, compared = recipes[choice.chosen], {"chosen": choice.chosen, "held_out": choice.perplexity}
            prune(target, tokenizer, recipe, text)
        else:
            prune(target, tokenizer, recipe, text)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    pruned = {name: linear.weight.detach().contiguous() for name, linear in mlp_linears(target).items()}
    save_file(pruned, weights)
    peers = {"llmcompressor": version("llmcompressor")} if method.startswith("llm-compressor") else {}
    result = {
        "seconds": wall,
        "cpu_seconds": cpu,
        "zeros": sum(int((w == 0).sum()) for w in pruned.values()) / sum(w.numel() for w in pruned.values()),
        "sequences": hashlib.sha256(sequences.numpy().tobytes()).hexdigest()[:8],
        "versions": {**versions(), **peers},
        **compared,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
