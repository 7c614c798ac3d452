"""One field of each row of a JSON file: objects on lines, or one array of objects.

Rows are parsed one at a time and everything but the field is dropped. A field that is not asked for may therefore have
any type in any row, and a broken line is one broken row. `datasets` infers the types of all fields instead and ends
where one changes. One row is held at a time, and a MiB of the file.
"""

import io
import json
from collections.abc import Iterator
from typing import IO, Any, cast

from gsae.errors import UsageError

from .row_values import Broken, Value, no_field

READ_CHARACTERS = 1 << 20
# An error this near to the end of what was read may be one of reading too little.
NEAR_THE_END = 16
BETWEEN_ELEMENTS = tuple(" \t\r\n,")


def json_lines(file: IO[bytes], field: str) -> Iterator[Value]:
    """Yield the field of the object on each line that is not empty."""
    for line in file:
        if line.strip():
            yield _line(line, field)


def json_values(file: IO[bytes], field: str) -> Iterator[Value]:
    """Yield the field of each object of an array, or on each line if the file does not begin with an array."""
    with io.BufferedReader(cast(io.RawIOBase, file), READ_CHARACTERS) as buffered:
        start = buffered.peek(READ_CHARACTERS).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if start != b"[":
            yield from json_lines(buffered, field)
            return
        with io.TextIOWrapper(buffered, "utf-8-sig") as text:
            for value in _elements(text):
                yield _field(value, field)


def _line(line: bytes, field: str) -> Value:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
        return Broken(f"not JSON ({type(error).__name__})")
    return _field(value, field)


def _field(value: Any, field: str) -> Value:
    if not isinstance(value, dict):
        return Broken(f"not a JSON object, but a value of type {type(value).__name__}")
    return value[field] if field in value else Broken(no_field(field, value))


def _elements(file: IO[str]) -> Iterator[Any]:
    """Yield the elements of the array that a file holds; what is kept of the file grows up to the longest element."""
    decoder, text, at, wanted = json.JSONDecoder(), file.read(READ_CHARACTERS).lstrip()[1:], 0, READ_CHARACTERS
    while True:
        while text[at : at + 1] in BETWEEN_ELEMENTS:
            at += 1
        if text.startswith("]", at):
            return
        found = _element(decoder, text, at)
        if found is None:
            more = file.read(wanted)
            if not more:
                raise UsageError("the array has no end")
            text, at, wanted = text[at:] + more, 0, wanted * 2
        else:
            (value, at), wanted = found, READ_CHARACTERS
            yield value


def _element(decoder: json.JSONDecoder, text: str, at: int) -> tuple[Any, int] | None:
    """Return the element at a place and where it ends; None if `text` may end before it does."""
    try:
        value, end = decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated") or error.pos >= len(text) - NEAR_THE_END:
            return None
        raise UsageError("the next element of the array is no JSON") from None
    return (value, end) if end < len(text) else None
