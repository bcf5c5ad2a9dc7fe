"""A command as one line, with everything that the user set by flags, in the environment or in a file."""

import shlex

import click
from click.core import ParameterSource

#: What says where the result goes or how it is shown.
_LEFT_OUT = {"config", "as_json", "verbose", "push_to_hub", "force"}


def command_line(ctx: click.Context) -> str:
    """The command that repeats a run."""
    words = ["neuronrank", str(ctx.command.name)]
    for parameter in ctx.command.params:
        name = parameter.name or ""
        value = ctx.params.get(name)
        if name in _LEFT_OUT or ctx.get_parameter_source(name) in (ParameterSource.DEFAULT, None):
            continue
        if isinstance(value, bool):
            words += parameter.opts[:1] if value else parameter.secondary_opts[:1]
        elif value is not None:
            words += [parameter.opts[0], str(value)]
    return shlex.join(words)
