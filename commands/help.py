"""How the options of a command are shown: by panel in `--help`, and as a Markdown table in docs/.

Plain text in two columns, because typer's boxes leave too little room for 36 options on two screens.
"""

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

from gsae.settings import NEEDED

COLUMN = 36  # width of the first column of --help, at most


class Command(TyperCommand):
    """A command with its options listed under their panels.

    Arguments come first, then what one needs, then the panels in order, then the options without a panel. These come
    before the panels in a command that has no panel of what one needs.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections with one width of the first column."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], NEEDED: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, TyperArgument):
                sections["Arguments"].append((str(parameter.metavar), record[1]))
            elif record is not None:
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        if not sections[NEEDED]:
            sections = {"Arguments": [], "Options": []} | sections
        width = max(min(len(name), COLUMN) for section in sections.values() for name, _ in section)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl([(name.ljust(width), text) for name, text in records], col_max=COLUMN)


def command_of(name: str, function: Callable[..., None]) -> TyperCommand:
    """Return the command that calls `function`, whose docstring is its help."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=Command)(function)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


def options_table(command: TyperCommand) -> str:
    """Return a Markdown table of a command's options: option, type, default and meaning, a row in bold for a panel."""
    panels: dict[str, list[str]] = {}
    for each in command.params:
        if isinstance(each, TyperOption):
            panels.setdefault(each.rich_help_panel or "Options", []).append(_row(each))
    lines = [line for panel, rows in panels.items() for line in (f"| **{panel}** | | | |", *rows)]
    return "\n".join(["| option | type | default | meaning |", "|---|---|---|---|", *lines])


def _row(option: TyperOption) -> str:
    """Return an option's row. Words after "Default:" in its help stand for a default that is no single value."""
    meaning, _, words = str(option.help).partition(" Default: ")
    name = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    if option.required:
        default = "required"
    elif words or option.default is None:
        default = words.rstrip(".")
    else:
        default = "off" if option.default is False else "on" if option.default is True else f"`{option.default}`"
    kind = "" if option.is_flag else f"`{option.metavar}`"
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (name, kind, default, meaning)) + " |"
