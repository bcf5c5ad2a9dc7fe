"""What every command of ``neuronrank`` has in common: help in sections, environment variables, errors in one line."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from neuronrank_cli import config_file as configuration
from neuronrank_cli.failures import explain

#: Exit code of a run that Ctrl-C ended, as shells have it.
INTERRUPTED = 130
#: Exit code of wrong input.
WRONG_INPUT = 2
#: The section that --help stands in too.
OUTPUT = "Output"


class Flag(click.Option):
    """An option in a section of the help, set in the environment by the name it has on the command line.

    Parameters
    ----------
    section : str
        Heading it stands under in the help.
    default_text : str
        The default in words, where the value does not say it.
    """

    def __init__(self, *names: Any, section: str = OUTPUT, default_text: str = "", **attributes: Any) -> None:
        self.section, self.default_text = section, default_text
        super().__init__(*names, **attributes)

    @property
    def spelling(self) -> str:
        """The flag as the help shows it."""
        return self.opts[0]

    def environment_name(self, ctx: click.Context) -> str:
        """Name of the environment variable that sets this flag."""
        return f"{ctx.auto_envvar_prefix}_{self.spelling.lstrip('-').replace('-', '_').upper()}"

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Look the flag up in the environment; empty is unset."""
        return os.environ.get(self.environment_name(ctx)) or None

    def origin(self, ctx: click.Context) -> str:
        """The environment variable or file that set this flag; empty where it was given or left alone."""
        source = ctx.get_parameter_source(self.name or "")
        if source is ParameterSource.ENVIRONMENT:
            return self.environment_name(ctx)
        return str(ctx.meta[configuration.META]) if source is ParameterSource.DEFAULT_MAP else ""

    def named(self, ctx: click.Context) -> str:
        """The flag as errors name it, with the environment variable or file where that is what holds the value."""
        origin = self.origin(ctx)
        return f"{self.spelling} (from {origin})" if origin else self.spelling

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """The same in click's own errors."""
        hint = super().get_error_hint(ctx)
        origin = self.origin(ctx) if ctx else ""
        return f"{hint} (from {origin})" if origin else hint

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Show the default in words without parentheses."""
        extra = super().get_help_extra(ctx)
        if self.default_text:
            extra["default"] = self.default_text
        return extra


def _config_flag() -> Flag:
    return Flag(
        ["--config"],
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=configuration.load,
        help="TOML file with settings under [COMMAND], keys named like the flags; flags given beat it.",
    )


class Command(click.Command):
    """A command whose help has sections, and that never shows a traceback unless asked.

    Parameters
    ----------
    tables : mapping
        Sections of the help after the flags: heading to (term, explanation).
    configurable : bool
        Whether it takes --config.
    """

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
        """Write the flags by section, in the order in which they are declared, then the tables."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            # Newer versions of click would list arguments too; the text above speaks of them.
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "section", OUTPUT), []).append(record)
        for heading, rows in [*sections.items(), *self.tables.items()]:
            with formatter.section(heading):
                # Padded, so that the explanations of all sections begin in one column.
                formatter.write_dl([(term.ljust(30), text) for term, text in rows])

    def invoke(self, ctx: click.Context) -> Any:
        """Run; exit 1 for a run that failed, 2 for wrong input, 130 for Ctrl-C, with one line and a hint."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt as stop:
            click.echo(f"Interrupted; {_left(stop)}", err=True)
            ctx.exit(INTERRUPTED)
        except SystemExit as stop:
            if os.environ.get("NEURONRANK_DEBUG") and stop.__cause__ is not None:
                traceback.print_exc(file=sys.__stderr__)
            click.echo(f"Ended; {_left(stop)}", err=True)
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # Whoever read stdout has left: click ends quietly then.
            if os.environ.get("NEURONRANK_DEBUG"):
                click.echo(traceback.format_exc(), err=True)
            failure = explain(error, {p.name: p.named(ctx) for p in self.params if isinstance(p, Flag) and p.name})
            # Wrong input is wrong for all processes, and the first says so; anything else nobody else may know.
            out = sys.stderr if speaks() or failure.exit_code == WRONG_INPUT else sys.__stderr__
            click.echo(f"Error: {failure.message}", file=out)
            if failure.hint:
                click.echo(f"Hint: {failure.hint}", file=out)
            for note in _notes(error):
                click.echo(f"Note: {note}", file=out)
            ctx.exit(failure.exit_code)


def speaks() -> bool:
    """Whether this process talks to the user: of several that torchrun started, the first does so for all."""
    return int(os.environ.get("RANK", "0")) == 0


def _left(stop: BaseException) -> str:
    """What a run that was told to end has left behind."""
    return "; ".join(_notes(stop)) or "nothing half-done is left behind"


def _notes(error: BaseException) -> list[str]:
    """What was added to an exception on its way (PEP 678): here, that finished work is kept."""
    notes: list[str] = getattr(error, "__notes__", [])
    return notes
