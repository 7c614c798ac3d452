"""The options of a command, made from a settings model, which alone declares name, type, default, help and panel.

`takes(Model)` adds an option for each field that has a panel to a command's own parameters. It costs the import of the
model, so the model's module must import nothing heavy. `help.py` shows the result.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from gsae.settings import Settings

Given: TypeAlias = dict[str, Any]  # the values of a model's options, by field name, where any was given
METAVARS = {int: "NUMBER", float: "NUMBER", str: "TEXT", list[str]: "TEXT"}

# Parameters that several commands share.
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Folder or s3://, gs:// or az:// URL of a store.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")]
MovedStores = Annotated[
    list[str] | None,
    typer.Option(
        "--store",
        metavar="STORE",
        help="A store that the run was trained from. Repeatable. Default: where it was at training.",
    ),
]
ModelOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The language model. Default: found by the name in the store.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code from the model's files, with your rights. Read it first."
    ),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps or auto.")]


def takes(model: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of `model` that has a panel.

    The command's first parameter gets the values as a dictionary, for `model(**given)`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        made = [_parameter(name, field) for name, field in model.model_fields.items() if _shown(field, "panel")]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {each.name: values.pop(each.name) for each in made}
            command({name: value for name, value in given.items() if value is not None}, **values)

        every = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*made, *own)]
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in every}
        return run

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return the typer parameter of a field. A default that a flag or a parser makes of text is None for typer."""
    kind, parser = _kind(field.annotation)
    flags = [flag] if (flag := _shown(field, "flags")) else []
    flag_of = name.replace("_", "-")
    if kind is bool and not flags:
        flags = [f"--{flag_of}"] if field.default is False else [f"--{flag_of}/--no-{flag_of}"]
    option = typer.Option(
        *flags,
        help=field.description,
        metavar=_shown(field, "metavar") or _metavar(kind),
        rich_help_panel=_shown(field, "panel"),
        parser=parser,
    )
    default = inspect.Parameter.empty if field.is_required() else field.default or None if parser else field.default
    if kind is str and default is not None and default is not inspect.Parameter.empty:
        default = str(default)
    annotation = Annotated[kind if field.is_required() else kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _shown(field: FieldInfo, key: str) -> str:
    """Return what `setting(...)` was given as `key`."""
    extra = field.json_schema_extra
    return str(extra.get(key, "")) if isinstance(extra, dict) else ""


def _kind(annotation: Any) -> tuple[Any, Callable[[str], Any] | None]:
    """Return the type that typer makes of an option's text, and the parser that goes on from there, if any.

    Limits are left to the model. An option of several types stays text: the model chooses.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (Union, UnionType):
        kinds = [each for each in arguments if each is not NoneType]
        return _kind(kinds[0]) if len(kinds) == 1 else (str, None)
    if origin is tuple:
        return (str, whole_numbers) if _kind(arguments[0])[0] is int else (list[str], None)
    return annotation, None


def _metavar(kind: Any) -> str | None:
    return f"[{'|'.join(get_args(kind))}]" if get_origin(kind) is Literal else METAVARS.get(kind)


def whole_numbers(text: str) -> tuple[int, ...]:
    """Read numbers and ranges, such as `0-3,9`, in ascending order. Raises typer.BadParameter."""
    try:
        ranges = [[int(end) for end in part.split("-", 1)] for part in text.split(",") if part.strip()]
    except ValueError:
        ranges = [[]]
    if not all(ends and ends[0] <= ends[-1] for ends in ranges):
        raise typer.BadParameter(f"got {text!r}; give numbers or ranges, for instance 0-3,9.")
    return tuple(sorted({number for ends in ranges for number in range(ends[0], ends[-1] + 1)}))
