"""Directives for what the code itself says, so that no command and no module can be forgotten."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from dataclasses import fields, is_dataclass
from types import GenericAlias
from typing import Any, get_args, get_type_hints

from click.testing import CliRunner
from docutils import nodes
from numpydoc.docscrape import NumpyDocString
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

from neuronrank_cli.app import cli
from neuronrank_cli.options import RECIPE_FLAGS
from neuronrank_core import Recipe


class CommandHelp(SphinxDirective):
    """``command-help``: what the help of every command prints, a section each."""

    def run(self) -> list[nodes.Node]:
        """Build the sections."""
        parts = []
        for words in ([], *([name] for name in sorted(cli.commands))):
            shown = CliRunner().invoke(cli, [*words, "--help"], prog_name="neuronrank", env={"COLUMNS": "100"}).output
            parts += [f"## {' '.join(['neuronrank', *words])}", f"````text\n{shown}````"]
        return self.parse_text_to_nodes("\n\n".join(parts), allow_section_headings=True)


class Modules(SphinxDirective):
    """``modules PACKAGE``: the docstrings of its modules, less the names that the package itself exports."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build the sections."""
        package = importlib.import_module(self.arguments[0])
        parts = []
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith("version"):
                continue
            inner = f".. automodule:: {module.name}\n   :members:"
            parts += [f"## {module.name.partition('.')[2]}", f"```{{eval-rst}}\n{inner}\n```"]
        return self.parse_text_to_nodes("\n\n".join(parts), allow_section_headings=True)


#: What each command returns: the content of ``--json``.
RESULTS = {
    "prune": "runs.prune_result.PruneResult",
    "eval": "runs.evaluate.EvalResult",
    "eval --tasks": "runs.tasks.TasksResult",
    "collect, merge": "runs.collect.CollectResult",
    "tune": "runs.tune.tune_result.TuneResult",
    "sweep": "runs.sweep_result.SweepResult",
    "verify": "runs.verify.verify_result.VerifyResult",
    "compare": "runs.compare.CompareResult",
    "chat": "runs.chat.ChatResult",
}


def result_types() -> dict[str, type]:
    """The dataclass of each result, by command."""
    found = {}
    for command, place in RESULTS.items():
        module, _, name = place.rpartition(".")
        found[command] = getattr(importlib.import_module(f"neuronrank_torch.{module}"), name)
    return found


def parts_of(kind: Any) -> list[type]:
    """The dataclasses within the fields of a dataclass, in order."""
    parts: list[type] = []
    for hint in get_type_hints(kind).values():
        waiting = [hint]
        while waiting:
            one = waiting.pop()
            waiting += get_args(one)
            if is_dataclass(one):
                parts += [one, *parts_of(one)]
    return list(dict.fromkeys(parts))


def explanations(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass, or of one that it extends, says of each field."""
    if kind is Recipe:  # Its fields are flags.
        return {spec.field: f"`{spec.flag}`: {spec.help}" for section in RECIPE_FLAGS.values() for spec in section}
    said: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        parameters = NumpyDocString(inspect.cleandoc(base.__doc__ or ""))["Parameters"] if is_dataclass(base) else []
        said |= {name.strip(): " ".join(p.desc) for p in parameters for name in p.name.split(",")}
    return said


def field_table(kind: Any) -> str:
    """A table of the fields of a dataclass: name, type and explanation."""
    said, rows = explanations(kind), ["| field | type | explanation |", "| --- | --- | --- |"]
    for f in fields(kind):
        shown = str(f.type).replace("|", "or").replace("None", "null")
        explained = said.get(f.name, "").replace("``", "`").replace("|", "\\|")
        rows.append(f"| `{f.name}` | `{shown}` | {explained} |")
    return "\n".join(rows)


class Results(SphinxDirective):
    """``results``: the fields of the result of every command, a section each, and of the objects within them."""

    def run(self) -> list[nodes.Node]:
        """Build the sections."""
        kinds = result_types()
        parts = [f"## neuronrank {command}\n\n{_introduced(kind)}" for command, kind in kinds.items()]
        within = dict.fromkeys(part for kind in kinds.values() for part in parts_of(kind))
        parts += [f"## {kind.__name__}\n\n{_introduced(kind)}" for kind in within]
        return self.parse_text_to_nodes("\n\n".join(parts), allow_section_headings=True)


def _introduced(kind: type) -> str:
    first = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].replace("``", "`")
    return f"{first}\n\n{field_table(kind)}"


def elsewhere(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Skip what another library defined, and on a page of modules what the page of exported names has."""
    del what, options
    if type(value) is GenericAlias:  # Of a built-in type: autodoc takes it for a class and fails.
        return True
    if skip or not (inspect.isroutine(value) or inspect.isclass(value)):
        return None
    package, _, by_module = app.env.docname.rpartition("/")[2].partition("-")
    exported = getattr(importlib.import_module(f"neuronrank_{package}"), name, None) is value
    return True if (by_module and exported) or not value.__module__.startswith("neuronrank") else None


def by_public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement) -> Any:
    """Resolve a reference to where an exported name is defined: it is documented under its public name."""
    home, _, name = node["reftarget"].rpartition(".")
    package = home.partition(".")[0]
    if node.get("refdomain") != "py" or not package.startswith("neuronrank_"):
        return None
    exported = importlib.import_module(package)
    if name not in getattr(exported, "__all__", ()) or importlib.util.find_spec(home) is None:
        return None
    if getattr(importlib.import_module(home), name, None) is not getattr(exported, name):
        return None
    public = f"{package}.{name}"
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], public, node, contnode)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("command-help", CommandHelp)
    app.add_directive("modules", Modules)
    app.add_directive("results", Results)
    app.connect("autodoc-skip-member", elsewhere)
    app.connect("missing-reference", by_public_name)
    return {"parallel_read_safe": True}
