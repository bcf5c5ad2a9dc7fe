"""Renders the page with templates that escape everything that comes from models and texts."""

import shlex
from dataclasses import fields
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from neuronrank_cli.console import protocol, size_text
from neuronrank_cli.options import SPELLING
from neuronrank_cli.page import charts
from neuronrank_core import Recipe
from neuronrank_core.methods import ALL_METHODS, exponents, method_of, needs_text, without_effect
from neuronrank_core.recipe import Exponents

#: Fields that have an effect only if text is read.
_TEXT = {"nsamples", "seqlen", "bos", "propagate", "seed"}
#: Fields of which a collection names those that differ from their defaults.
_SAMPLING = ("bos", "seed", "signal", "threshold", "tokens_per_document")


def render(data: dict[str, Any]) -> str:
    """Render what :func:`neuronrank_torch.runs.page.gather.gather` collected.

    Parameters
    ----------
    data : dict

    Returns
    -------
    str
        A complete HTML document.
    """
    environment = Environment(
        loader=PackageLoader("neuronrank_cli.page", "templates"),
        autoescape=True,  # Tokens, prompts and names may contain markup.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=size_text, percent=lambda share, digits=2: f"{share:.{digits}%}", count="{:,}".format
    )
    environment.filters["quote"] = shlex.quote
    environment.globals.update(chart=charts, methods=ALL_METHODS, protocol=protocol, shares_of=shares_of)
    recipe = data["run"].recipe
    flags, sizes = recipe_rows(recipe), module_sizes(data)
    idf_used = "idf_exp" in method_of(recipe).reads and exponents(recipe).idf_exp != 0
    total = sparsity_total(sizes, data["sparsity"]["head"])
    known = {"flags": flags, "sizes": sizes, "total": total, "idf_used": idf_used, "collect": collect_command(data)}
    return environment.get_template("page.html").render(data, **known)


def collect_command(data: dict[str, Any]) -> str:
    """The command that collects statistics as the run did."""
    run, plain = data["run"], Recipe()
    words = ["neuronrank", "collect", "--model", data["model"]]
    if run.calibration.tokens:
        words += ["--dataset", run.calibration.dataset or run.job.dataset]
    for name in ("nsamples", "seqlen", *_SAMPLING):
        value = getattr(run.recipe, name)
        if name not in _SAMPLING or value != getattr(plain, name):
            words += [SPELLING[name], str(value)]
    return shlex.join([*words, "--save", "stats"])


def recipe_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """The flags of a run that had an effect."""
    idle = set(without_effect(recipe, SPELLING)) | (set() if needs_text(recipe) else _TEXT)
    idle |= {f.name for f in fields(Exponents)} - method_of(recipe).reads
    rows = []
    for name, flag in SPELLING.items():
        value = getattr(recipe, name)
        if name not in idle and value is not None and value is not False:
            rows.append((flag, f"{value:g}" if isinstance(value, float) else "yes" if value is True else str(value)))
    return rows


def module_sizes(data: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """Weights before pruning, and weights that are zero or removed now, of every module by layer.

    Zeros are counted in the saved tensors. Removed weights cannot be: where neurons or heads were removed, the sizes
    before pruning are those in ``neuronrank.json``.
    """
    was = {layer.layer: layer.modules for layer in data["run"].layers}
    shrunk = data["run"].recipe.structured
    modules: dict[str, dict[int, dict[str, Any]]] = {}
    for layer in data["sparsity"]["layers"]:
        for name, now in layer["modules"].items():
            before = was.get(layer["layer"], {}).get(name)
            size = before.size if before and shrunk else now["size"]
            lost = {"size": size, "zeros": now["zeros"], "removed": size - now["size"]}
            changed = before is not None and any(getattr(before, key) != value for key, value in lost.items())
            state = {"pruned": before is not None, "changed": changed}
            modules.setdefault(name, {})[layer["layer"]] = lost | state
    return modules


def shares_of(
    sizes: dict[str, dict[int, dict[str, Any]]], removed: int
) -> tuple[list[tuple[dict[str, Any], list[str]]], dict[str, dict[int, float]]]:
    """Modules with the same share of weights zero or removed in all layers, by share; and the shares of the others."""
    uniform: dict[tuple[float, int], list[str]] = {}
    varied = {}
    for module, layers in sizes.items():
        shares = {layer: m["removed" if removed else "zeros"] / m["size"] for layer, m in layers.items()}
        if len(set(shares.values())) == 1:
            uniform.setdefault((next(iter(shares.values())), len(shares)), []).append(module)
        else:
            varied[module] = shares
    return [({"share": share, "layers": count}, names) for (share, count), names in uniform.items()], varied


def sparsity_total(sizes: dict[str, dict[int, dict[str, Any]]], head: dict[str, int] | None) -> dict[str, int]:
    """Sums over the modules that were pruned."""
    counted = [module for layers in sizes.values() for module in layers.values() if module["pruned"]]
    counted += [{**head, "removed": 0}] if head else []
    return {name: sum(module[name] for module in counted) for name in ("size", "zeros", "removed")}
