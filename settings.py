"""Checked values: the settings of a command, the contents of a file, and one line for the first fault in either.

A setting is declared once, as a field of a frozen model with its type, default, limits and `description`. The command
line, the Python API, the resume check and the table in docs/ are made from it (`commands/options.py`).
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gsae.errors import UsageError

NEEDED = "What one needs"  # the panel of the few options that one starts with; it comes first
SHOWN_CHARACTERS = 200
SHOWN_INPUT = 60
PYDANTIC_SUBJECT = re.compile(r"^(Value error, |\w+ should (be|have) )")


class Settings(BaseModel):
    """A frozen set of checked values. Raises UsageError with one line about the first value that cannot work."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        fields = type(self).model_fields
        for name in values:
            if name not in fields:
                raise UsageError(unknown("setting", name, fields))
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(f"Setting {first_fault(error)}.") from None


class Contract(BaseModel):
    """What a JSON file of a run holds, for its writer and its readers. Fields that a newer version added are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)


def setting(
    default: Any, description: str, *, panel: str = "", flags: str = "", metavar: str = "", **limits: Any
) -> Any:
    """Declare a field of `Settings`: `default` (... where one must be given) and `description`, its help text.

    panel: the heading it stands under in `--help`; a field without one is not an option of the command. flags: the
    option's names where they are not `--field-name`, such as "--site". metavar: what `--help` shows for its value.
    limits: pydantic's (ge, gt, le, lt, max_length).
    """
    shown = {"panel": panel, "flags": flags, "metavar": metavar}
    return Field(default, description=description, json_schema_extra={k: v for k, v in shown.items() if v}, **limits)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that there is no `kind` of this name, and which one was probably meant, or which there are."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    rest = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(names)}."
    return f"There is no {kind} {name!r}. {rest}"


def first_fault(error: ValidationError) -> str:
    """Return the first fault of a pydantic error in one short line without a full stop, its characters printable."""
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"])
    needed = PYDANTIC_SUBJECT.sub("", fault["msg"]).rstrip(".")
    if fault["type"] == "missing":
        line = f"{place} is missing"
    elif place and isinstance(fault["input"], dict):  # too long to be shown
        line = f"{place}: {needed}"
    elif place:
        line = f"{place}: got {repr(fault['input'])[:SHOWN_INPUT]}; needed: {needed}"
    else:
        line = needed
    return "".join(c if c.isprintable() else "?" for c in line)[:SHOWN_CHARACTERS]
