"""The pruning methods: one file each, found by being here.

A method is declared once, in a module of this package that binds ``METHOD`` to an instance of a subclass of
:class:`Method`: its formula, the statistics it needs, its comparison group and its defaults.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from neuronrank_core.methods.base import Method

#: Every method by name.
METHODS: dict[str, Method] = {
    method.name: method
    for module in iter_modules(__path__)
    if module.name not in ("base", "context", "scoring")
    for method in [import_module(f"{__name__}.{module.name}").METHOD]
}

__all__ = ["METHODS", "Method"]
