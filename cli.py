"""The `gsae` command: its help, its signals, and the exit code of every error. The commands are in `commands/`.

A command's file is imported when the command is called, so that `gsae --help` answers without pydantic and torch.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from gsae import __version__
from gsae.commands import COMMANDS, HELP_WIDTH
from gsae.errors import GsaeError, InterruptedRun, NotFoundError


class LazyCommand(TyperCommand):
    """A command of the table: its name and summary are known, its options when it is called."""

    def load(self) -> TyperCommand:
        """Import the command's file and return the command with its options."""
        from gsae.commands.help import command_of

        file, function = COMMANDS[str(self.name)][0].split(":")
        return command_of(str(self.name), getattr(import_module(f"gsae.commands.{file}"), function))

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the command line of the loaded command, which the context then names."""
        return self.load().make_context(*arguments, **options)


class Commands(TyperGroup):
    """The commands of the table, listed with whole summaries."""

    def __init__(self, **settings: Any) -> None:
        lazy = {name: LazyCommand(name, help=summary) for name, (_, summary) in COMMANDS.items()}
        super().__init__(**settings | {"commands": lazy})

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands for `gsae --help`."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


app = typer.Typer(
    name="gsae",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": HELP_WIDTH},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gsae {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")] = False,
) -> None:
    """Run the language model once; fit Gated SAEs from its stored activations again and again.

    Each command has its own help: gsae COMMAND --help.
    """


def main() -> None:
    """Run the command line. Every error that the user can correct is one line, with its own exit code."""
    try:
        with _stop_cleanly():
            app(prog_name="gsae")
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # an InterruptedRun passes through every `except Exception`
        if "--debug" in sys.argv:
            raise
        sys.exit(_report(error))


@contextmanager
def _stop_cleanly() -> Iterator[None]:
    """Let the first SIGTERM or Ctrl-C end the command after what is being written; let the second end it at once."""

    def stop(number: int, frame: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        raise InterruptedRun(f"Stopped by {name}. The same command continues from here.", 128 + number)

    before = [(each, signal.signal(each, stop)) for each in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    finally:
        for each, handler in before:
            signal.signal(each, handler)


def _report(error: BaseException) -> int:
    """Print an error in one line and return its exit code."""
    from gsae.commands.extras import explain_missing

    if (missing := explain_missing(error)) is not None:
        error = NotFoundError(missing)
    if isinstance(error, (GsaeError, InterruptedRun)):
        typer.echo(f"gsae: {error}", err=True)
        return error.exit_code
    typer.echo(f"gsae: {type(error).__name__}: {error} (a fault of gsae: run again with --debug)", err=True)
    return 1


if __name__ == "__main__":
    main()
