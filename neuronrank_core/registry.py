"""Finds what the modules of a package declare, so that an extension is one new file."""

from collections.abc import Collection, Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def declared(package: str, path: Iterable[str], attribute: str, *, besides: Collection[str]) -> dict[str, Any]:
    """The attribute of each module in a package, by the name of the module.

    Parameters
    ----------
    package : str
        ``__name__`` of the package.
    path : iterable of str
        ``__path__`` of the package.
    attribute : str
        What a module declares, such as ``METHOD``.
    besides : collection of str
        Modules that declare nothing.
    """
    names = [module.name for module in iter_modules(path) if module.name not in besides]
    return {name: getattr(import_module(f"{package}.{name}"), attribute) for name in names}
