"""Settings from a TOML file: a section for each command, with keys named like its flags."""

import difflib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from neuronrank_core import InputError
from neuronrank_torch.paths import local_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


#: Key of the file and section of the settings in the meta data of a context.
META = "neuronrank.config"
#: The values that a flag allows in a file: a test, and a description.
_Kind = tuple[Callable[[Any], bool], str]


def load(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Callback of --config: the settings in the file become the defaults of the command."""
    del param
    if value is not None:
        try:
            file = local_path(value)
        except InputError as error:
            raise click.UsageError(str(error), ctx) from error
        ctx.default_map = read(file, ctx)
        ctx.meta[META] = f"{file}, [{ctx.command.name}]"


def read(file: Path, ctx: click.Context) -> dict[str, Any]:
    """Values for the flags of a context's command, by parameter.

    Raises
    ------
    click.UsageError
        If the file cannot be read, or a section, key or type is wrong. Names all three.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"cannot read {file}: {error.strerror}", ctx) from error
    except ValueError as error:  # Not TOML, or not UTF-8.
        raise click.UsageError(f"{file}: {error}", ctx) from error
    root = ctx.find_root().command
    sections = list(root.commands) if isinstance(root, click.Group) else [str(ctx.command.name)]
    for name, section in content.items():
        if not isinstance(section, dict):
            raise click.UsageError(f"{file}: {name} is not in a section such as [{ctx.command.name}]", ctx)
        if name not in sections:
            raise click.UsageError(f"{file}: [{name}] is not a command{nearest(name, sections)}", ctx)
    return _values(content.get(str(ctx.command.name), {}), f"{file}, [{ctx.command.name}]", ctx)


def _values(section: dict[str, Any], where: str, ctx: click.Context) -> dict[str, Any]:
    parameters = {key: p for p in ctx.command.params if p.name != "config" for key in keys(p)}
    values: dict[str, Any] = {}
    for written, value in section.items():
        parameter = parameters.get(dashed(written))
        if parameter is None or parameter.name is None:
            raise click.UsageError(f"{where}: unknown key {written}{nearest(dashed(written), parameters)}", ctx)
        if parameter.name in values:
            raise click.UsageError(f"{where}: {written} is set twice", ctx)
        fits, allowed = _kind(parameter)
        if not fits(value):
            raise click.UsageError(f"{where}: {written} is {json.dumps(value, default=str)}, allowed: {allowed}", ctx)
        values[parameter.name] = value
    return values


def keys(parameter: click.Parameter) -> list[str]:
    """Names of a parameter in a file, with dashes. Underscores are allowed too."""
    if isinstance(parameter, click.Option):
        return [dashed(flag.lstrip("-")) for flag in parameter.opts]
    return [dashed(parameter.name or "")]


def _kind(parameter: click.Parameter) -> _Kind:
    if parameter.nargs == -1 or parameter.multiple:
        fits, what = _single(parameter)

        def each(value: Any) -> bool:  # Strings too, as in earlier versions; click converts them.
            return isinstance(value, list) and all(isinstance(one, str) or fits(one) for one in value)

        return each, f"a list, each {what}"
    return _single(parameter)


def _single(parameter: click.Parameter) -> _Kind:
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return lambda v: isinstance(v, bool), "true or false"
    if isinstance(parameter.type, click.types.IntParamType):
        return lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number"
    if isinstance(parameter.type, click.types.FloatParamType):
        return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool), "a number"
    if parameter.type.name == "share":
        return lambda v: isinstance(v, (int, float, str)) and not isinstance(v, bool), "a number or a percentage"
    return lambda v: isinstance(v, str), "a string"


def dashed(name: str) -> str:
    """A name in which underscores and dashes are interchangeable."""
    return name.replace("_", "-")


def nearest(name: str, names: Iterable[str]) -> str:
    """A question after a name that is unknown, if one of the known names is similar; otherwise nothing."""
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]}?" if near else ""
