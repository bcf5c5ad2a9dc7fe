"""Makes the page: templates that escape whatever comes from models and texts."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from neuronrank_cli.console import protocol, size_text
from neuronrank_cli.options import SPELLING
from neuronrank_cli.page import charts
from neuronrank_core import METHODS, Recipe
from neuronrank_core.methods import needs_text, without_effect
from neuronrank_core.recipe import Exponents

#: Fields that matter only where text is read.
_TEXT = {"nsamples", "seqlen", "bos", "propagate", "seed"}


def render(data: dict[str, Any]) -> str:
    """Render what :func:`neuronrank_torch.runs.page.gather.gather` collected.

    Parameters
    ----------
    data : dict

    Returns
    -------
    str
        A whole HTML document.
    """
    environment = Environment(
        loader=PackageLoader("neuronrank_cli.page", "templates"),
        autoescape=True,  # Tokens, prompts and names may hold markup; it stays text.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=size_text, percent=lambda share, digits=2: f"{share:.{digits}%}", count="{:,}".format
    )
    environment.globals.update(chart=charts, methods=METHODS, protocol=protocol)
    return environment.get_template("page.html").render(
        data, flags=recipe_rows(data["run"]["recipe"]), sizes=module_sizes(data)
    )


def recipe_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The flags that a run was made with, as far as they had an effect."""
    recipe = Recipe(**values)
    idle = set(without_effect(recipe, SPELLING)) | (set() if needs_text(recipe) else _TEXT)
    idle |= {f.name for f in fields(Exponents)} - METHODS[recipe.method].reads
    rows = []
    for name, flag in SPELLING.items():
        value = values[name]
        if name not in idle and value is not None and value is not False:
            rows.append((flag, f"{value:g}" if isinstance(value, float) else "yes" if value is True else str(value)))
    return rows


def module_sizes(data: dict[str, Any]) -> dict[str, dict[int, dict[str, int]]]:
    """Weights before pruning, and those that are zero or gone now, of every pruned module by layer.

    Weights are counted in the saved model; how many there were before comes from the run's report.
    """
    was = {layer["layer"]: layer["modules"] for layer in data["run"]["layers"]}
    modules: dict[str, dict[int, dict[str, int]]] = {}
    for layer in data["sparsity"]["layers"]:
        for name, now in layer["modules"].items():
            before = was.get(layer["layer"], {}).get(name)
            size = before["size"] if before else now["size"]
            lost = {"size": size, "zeros": now["zeros"], "removed": size - now["size"]}
            changed = before is not None and (before["zeros"], before["removed"]) != (lost["zeros"], lost["removed"])
            modules.setdefault(name, {})[layer["layer"]] = {**lost, "changed": changed}
    return modules
