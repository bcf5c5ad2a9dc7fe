"""``neuronrank config``."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import click
from click.core import ParameterSource

from neuronrank_cli.command import OUTPUT, Command, origin
from neuronrank_cli.console import print_table, show
from neuronrank_cli.options import flag, json_flag, recipe_of, settings_of_target
from neuronrank_core.effort import effort_settings
from neuronrank_core.methods import decided
from neuronrank_core.recipe import PRESETS

_SOURCES = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
}


@dataclass(frozen=True)
class Setting:
    """The value of a flag, and its source: flag, environment, file, preset, target, effort or default."""

    value: Any
    source: str
    where: str = ""


EXAMPLE = """\b
Example:
  neuronrank config --show prune --config run.toml --nsamples 64
"""


@click.command(
    "config", cls=Command, configurable=False, context_settings={"ignore_unknown_options": True}, epilog=EXAMPLE
)
@flag("--show", OUTPUT, "Command whose settings to show.", into="name", metavar="COMMAND", required=True)
@json_flag
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def config(ctx: click.Context, /, name: str, as_json: bool, flags: tuple[str, ...]) -> None:
    """Show the value of every setting of a command, and its source.

    FLAGS are those of the command. In order of precedence, values come from flags, the environment, the file of
    --config, the preset, the effort, and the defaults.
    """
    group = ctx.find_root().command
    command = group.commands.get(name) if isinstance(group, click.Group) else None
    if command is None or command is ctx.command:
        raise click.UsageError(f"{name!r} is not a command with settings", ctx)
    show(effective(command, flags, ctx.find_root()), as_json, print_settings)


def effective(command: click.Command, flags: tuple[str, ...], parent: click.Context) -> dict[str, Setting]:
    """The settings of a command with these flags, by flag."""
    shown = copy.copy(command)
    shown.params = [copy.copy(parameter) for parameter in command.params]
    for parameter in shown.params:
        parameter.required = False  # Settings can be shown without naming a model.
    ctx = shown.make_context(str(command.name), list(flags), parent=parent)
    values = {**ctx.params, **_decided(ctx)}
    return {
        parameter.opts[0]: _setting(ctx, parameter, values[parameter.name])
        for parameter in shown.params
        if parameter.name in ctx.params
    }


def _decided(ctx: click.Context) -> dict[str, Any]:
    """The recipe for these values, with the defaults of its method filled in."""
    if not {"method", "preset"} <= ctx.params.keys():
        return {}
    return asdict(decided(recipe_of(ctx, ctx.params)))


def _setting(ctx: click.Context, parameter: click.Parameter, value: Any) -> Setting:
    source = ctx.get_parameter_source(str(parameter.name))
    if source in _SOURCES:
        return Setting(value, _SOURCES[source], origin(parameter, ctx))
    preset, effort = ctx.params.get("preset"), ctx.params.get("effort")
    if parameter.name in PRESETS.get(str(preset), {}):
        return Setting(value, "preset", str(preset))
    if effort and parameter.name in effort_settings(effort, ctx.params["sparsity_type"]):
        return Setting(value, "effort", effort)
    if parameter.name in settings_of_target(ctx.params):
        return Setting(value, "target")
    unset = value is None or value == ()
    return Setting(value, "default", getattr(parameter, "default_text", "") if unset else "")


def print_settings(settings: dict[str, Setting]) -> None:
    """Print a line for each flag; a dash stands for a value that is not set."""
    headings = ("flag", "value", "from")
    rows = [[name, _shown(setting.value), _origin(setting)] for name, setting in settings.items()]
    print_table(headings, rows, left=headings)


def _shown(value: Any) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return ", ".join("-" if one is None else str(one) for one in values) or "-"


def _origin(setting: Setting) -> str:
    between = ": " if setting.source == "default" and setting.where else " "
    return f"{setting.source}{between}{setting.where}".strip()
