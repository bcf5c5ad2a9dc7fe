"""Directives for what the code itself says, so that no command and no module can be forgotten."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from types import GenericAlias
from typing import Any

from click.testing import CliRunner
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

from neuronrank_cli.app import cli


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
    app.connect("autodoc-skip-member", elsewhere)
    app.connect("missing-reference", by_public_name)
    return {"parallel_read_safe": True}
