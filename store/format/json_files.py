"""The JSON files of a store: strict types, one canonical text for each value, and one line for what is wrong in a file.

A file that is not in canonical form is refused, so that the sha256 of a file follows from its value alone.
"""

import hashlib
import json
import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from gsae.errors import CorruptError, IncompatibleError
from gsae.settings import SHOWN_CHARACTERS, first_fault

SCHEMA_VERSION = "1.0"

Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
Text = Annotated[str, Field(pattern=r"^\P{Cc}*$", max_length=4096)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StoredValue(BaseModel):
    """A value in a JSON file of a store. Types are strict; fields that a newer minor version added are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)


class OmitsDefaults(StoredValue):
    """A stored value; its optional fields are not written if they are equal to their default."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        for name, field in type(self).model_fields.items():
            if name in fields and not field.is_required() and fields[name] == field.default:
                del fields[name]
        return fields


T = TypeVar("T", bound=StoredValue)


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of `value`: sorted keys, no spaces, shortest floats, UTF-8, a final newline."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def to_json(value: StoredValue) -> bytes:
    """Return the canonical JSON of a stored value."""
    return canonical_json(value.model_dump(mode="json"))


def sha256(data: bytes) -> str:
    """Return the sha256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def parse(kind: type[T], data: bytes, where: str) -> T:
    """Read a `kind` (a plan, record or manifest) from canonical JSON; `where` names the file in errors.

    Raises CorruptError if the data is something else, or not in canonical form; IncompatibleError if its format is
    newer than this version reads.
    """
    try:
        loose = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where} is not JSON: {error}.") from None
    if not isinstance(loose, dict):
        raise CorruptError(f"{where} holds a {type(loose).__name__}; an object is needed.")
    check_schema(loose.get("schema_version"), where)
    try:
        value = kind.model_validate_json(data)
    except ValidationError as error:
        raise CorruptError(f"{where} holds a value that cannot be: {first_fault(error)}.") from None
    if not _is_canonical(value, data):
        raise CorruptError(f"{where} is not in canonical form, so it was changed after it was written.")
    return value


def _is_canonical(value: StoredValue, data: bytes) -> bool:
    try:
        return to_json(value) == data
    except (ValueError, RecursionError):  # an infinity or an endless number in a field that this version does not know
        return False


def check_schema(version: Any, where: str) -> None:
    """Raise IncompatibleError if the major version of a store's format is newer than this version reads."""
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", version):
        found = repr(version)[:SHOWN_CHARACTERS]
        raise CorruptError(f"{where} has no schema_version such as {SCHEMA_VERSION!r}; found {found}.")
    if int(version.split(".")[0]) > int(SCHEMA_VERSION.split(".")[0]):
        raise IncompatibleError(
            f"{where} has format {version}; this gsae reads up to {SCHEMA_VERSION}. Install a newer gsae."
        )
