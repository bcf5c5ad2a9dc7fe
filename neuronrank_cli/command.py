"""What all commands have in common: help in sections, environment variables, errors in one line."""

import errno
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from neuronrank_cli import config_file
from neuronrank_cli.console import fold, warn
from neuronrank_cli.failures import explain
from neuronrank_torch.distributed import launcher

#: Exit code after Ctrl-C, as in shells.
INTERRUPTED = 130
#: Exit code of invalid input.
WRONG_INPUT = 2
#: Shows tracebacks if it is set.
DEBUG = "NEURONRANK_DEBUG"
#: Stands for a hyphen that a line is not broken at.
_HYPHEN = "\N{NON-BREAKING HYPHEN}"
#: The section that also lists --help.
OUTPUT = "Output"


class Flag(click.Option):
    """An option in a section of the help. Its environment variable has the name that it has on the command line.

    Parameters
    ----------
    section : str
        Heading in the help.
    default_text : str
        The default in words, if the value alone is not clear.
    """

    def __init__(self, *names: Any, section: str = OUTPUT, default_text: str = "", **attributes: Any) -> None:
        self.section, self.default_text = section, default_text
        super().__init__(*names, **attributes)

    def environment_name(self, ctx: click.Context) -> str:
        """Name of the environment variable that sets this flag."""
        return f"{ctx.auto_envvar_prefix}_{self.variable}"

    @property
    def variable(self) -> str:
        """The flag's part of that name."""
        return self.opts[0].lstrip("-").replace("-", "_").upper()

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Look up the flag in the environment; an empty value counts as unset."""
        return os.environ.get(self.environment_name(ctx)) or None

    def named(self, ctx: click.Context | None, name: str = "") -> str:
        """The flag as named in errors, with the environment variable or file that set it."""
        source = origin(self, ctx) if ctx else ""
        return (name or self.opts[0]) + (f" (from {source})" if source else "")

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """Read the environment. A text is not split at spaces: if it can be repeated, there is one per line."""
        value = self.resolve_envvar_value(ctx)
        if value is not None and self.multiple and self.type is click.STRING:
            return tuple(value.splitlines())
        return super().value_from_envvar(ctx)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """The same in click's own errors."""
        return self.named(ctx, super().get_error_hint(ctx))

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Show the default and the range in words."""
        extra = super().get_help_extra(ctx)
        shown = extra.pop("range", "")
        if shown not in ("", "x>=0", "x>=1"):
            extra["range"] = shown.replace("x>=", "at least ")
        if self.default_text:
            extra["default"] = self.default_text
        return extra


def _config_flag() -> Flag:
    return Flag(
        ["--config"],
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=config_file.load,
        help="TOML file with settings in [COMMAND], named like the flags. Explicit flags take precedence.",
    )


def origin(parameter: click.Parameter, ctx: click.Context) -> str:
    """The environment variable or file that set a parameter; empty if it was given or not set."""
    source = ctx.get_parameter_source(parameter.name or "")
    if source is ParameterSource.ENVIRONMENT and isinstance(parameter, Flag):
        return parameter.environment_name(ctx)
    return str(ctx.meta[config_file.META]) if source is ParameterSource.DEFAULT_MAP else ""


class _Formatter(click.HelpFormatter):
    """Breaks lines at spaces only. Python breaks them at hyphens too, even within flags."""

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", _HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], *args: Any, **attributes: Any) -> None:
        super().write_dl([(term, text.replace("-", _HYPHEN)) for term, text in rows], *args, **attributes)

    def getvalue(self) -> str:
        return super().getvalue().replace(_HYPHEN, "-")


class _Context(click.Context):
    formatter_class = _Formatter


class Group(click.Group):
    """The group of all commands."""

    context_class = _Context

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. Names the environment variables that look like flags and are not."""
        known = {
            f"{ctx.auto_envvar_prefix}_{name}_{flag.variable}".upper(): None
            for name, command in self.commands.items()
            for flag in command.params
            if isinstance(flag, Flag)
        }
        for variable in sorted(os.environ):
            if variable.startswith(f"{ctx.auto_envvar_prefix}_") and variable not in {DEBUG, *known}:
                warn(f"unknown environment variable {variable}{config_file.nearest(variable, known)}")
        return super().invoke(ctx)


class Command(click.Command):
    """A command whose help has sections, and whose failures are one line and a hint.

    Parameters
    ----------
    tables : mapping
        More sections of the help, after the flags: heading to (term, explanation).
    configurable : bool
        Whether it has --config.
    """

    context_class = _Context

    def __init__(
        self,
        *args: Any,
        tables: Mapping[str, Sequence[tuple[str, str]]] | None = None,
        configurable: bool = True,
        **attributes: Any,
    ) -> None:
        self.tables = tables or {}
        super().__init__(*args, **attributes)
        if configurable:
            self.params.append(_config_flag())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags by section, in the order of their declaration, then the tables."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            # Newer versions of click list arguments too; the description explains them.
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "section", OUTPUT), []).append(record)
        for heading, rows in [*sections.items(), *self.tables.items()]:
            with formatter.section(heading):
                # Padded, so that the explanations of all sections start in the same column.
                formatter.write_dl([(term.ljust(30), text) for term, text in rows])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the flags."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _folded(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run. Exit with 1 for a failed run, 2 for invalid input and 130 after Ctrl-C, with one line and a hint."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _folded(error) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt as stop:
            click.echo(f"Interrupted; {_kept(stop)}", err=True)
            ctx.exit(INTERRUPTED)
        except SystemExit as stop:
            if os.environ.get(DEBUG) and stop.__cause__ is not None:
                traceback.print_exc(file=sys.__stderr__)
            click.echo(f"Terminated; {_kept(stop)}", err=True)
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # The reader of stdout is gone: click exits without a message.
            if os.environ.get(DEBUG):
                click.echo(traceback.format_exc(), err=True)
            failure = explain(error, {p.name: p.named(ctx) for p in self.params if isinstance(p, Flag) and p.name})
            # Invalid input fails in all processes, and the first reports it. Other failures may be of this one alone.
            out: Any = sys.stderr if launcher.first() or failure.exit_code == WRONG_INPUT else sys.__stderr__
            click.echo(fold(f"Error: {failure.message}", out), file=out)
            if failure.hint:
                click.echo(fold(f"Hint: {failure.hint}", out), file=out)
            for note in _notes(error):
                click.echo(fold(f"Note: {note}", out), file=out)
            ctx.exit(failure.exit_code)


def _folded(error: click.UsageError) -> click.UsageError:
    """An error of click whose message is wrapped at spaces, after the word that click puts before it."""
    word = "Error: "
    return click.UsageError(fold(word + error.format_message(), sys.stderr).removeprefix(word), error.ctx)


def _kept(stop: BaseException) -> str:
    """What is kept of a run that was stopped."""
    return "; ".join(_notes(stop)) or "nothing was saved"


def _notes(error: BaseException) -> list[str]:
    """The notes of an exception (PEP 678): here, that finished work is kept."""
    return list(getattr(error, "__notes__", []))
