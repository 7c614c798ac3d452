"""What a row of a text holds: its field checked, and one line about a row that cannot be used."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .document import Content, Document

SHOWN_CHARACTERS = 300
Value = Any
"""The value of a row's field as its file gives it, or `Broken`."""


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read. fault: what is wrong with it, such as "not a JSON object"."""

    fault: str


def no_field(field: str, names: Iterable[str]) -> str:
    """Say that a row or table does not have a field."""
    return f"no field {field!r}. It has: {', '.join(sorted(names))}"


def document_of(number: int, value: Value, name: str, row: int, field: str, tokenised: bool) -> Document:
    """Return the document of a row, marked as bad if it cannot be used. name, row: of the text, for the mark."""
    if isinstance(value, Broken):
        return _bad(number, name, row, value.fault)
    content = _token_ids(value) if tokenised else _text(value)
    if content is not None:
        return Document(number, content)
    needed = "a list of token ids is needed" if tokenised else "text is needed (for token ids: --token-field)"
    found = "nothing" if value is None else f"a value of type {type(value).__name__}"
    if isinstance(value, str) and not tokenised:
        found = "half of a surrogate pair, which is not Unicode"
    return _bad(number, name, row, f"field {field!r} holds {found}; {needed}")


def _bad(number: int, name: str, row: int, fault: str) -> Document:
    line = f"Text {name!r}, row {row}: {fault}"[:SHOWN_CHARACTERS]
    return Document(number, "", bad="".join(c if c.isprintable() else "?" for c in line))


def _text(value: Value) -> Content | None:
    return value if isinstance(value, str) and _is_unicode(value) else None


def _is_unicode(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which the tokenizer cannot read
        return False


def _token_ids(value: Value) -> NDArray[np.int32] | None:
    if not isinstance(value, list):
        return None
    try:
        ids = np.asarray(value or np.empty(0, np.int64))
    except ValueError:  # lists of different lengths
        return None
    fits = ids.ndim == 1 and ids.dtype.kind in "iu" and (not len(ids) or 0 <= ids.min() <= ids.max() < 1 << 31)
    return ids.astype(np.int32) if fits else None
